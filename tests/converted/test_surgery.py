"""Convert and strip: what they return, and what they cost."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from snapshots import snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import EVERYTHING, EXCITING_MODES, ZOO_INPUT, ConvNet, Zoo, is_vanilla

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.state import stored_plan
from we_surgery.planning import rows
from we_surgery.planning.plans import Plan
from we_surgery.planning.rows import Decision


@pytest.mark.parametrize("mode", EXCITING_MODES)
def test_a_converted_model_strips_to_the_vanilla_one(mode: str) -> None:
    vanilla, x = Zoo(), torch.randn(ZOO_INPUT)
    converted = ws.convert(vanilla, mode)
    converted(x).square().mean().backward()
    stripped, report = ws.strip_with_report(converted, example_inputs=x)
    assert report.output_difference == 0
    assert report.relative_difference == 0
    assert [type(m) for m in stripped.modules()] == [type(m) for m in vanilla.modules()]
    assert list(stripped.state_dict()) == list(vanilla.state_dict())
    assert torch.equal(stripped.eval()(x), converted.eval()(x))


def test_convert_returns_a_copy_unless_told_otherwise() -> None:
    model = ConvNet()
    before = snapshot(model)
    converted = ws.convert(model)
    assert converted is not model
    assert snapshot(model) == before
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in converted.parameters())
    assert ws.convert(model, inplace=True) is model
    assert not is_vanilla(model)


def test_strip_returns_a_copy_unless_told_otherwise() -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING)
    before = snapshot(model)
    stripped = ws.strip(model, example_inputs=torch.randn(2, 3, 8, 8))
    assert stripped is not model
    assert snapshot(model) == before
    assert ws.strip(model, inplace=True) is model
    assert is_vanilla(model)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stripped.state_dict().items())


def test_surgery_in_place_keeps_modules_and_parameters_themselves() -> None:
    model = ConvNet()
    modules, parameters = list(model.modules()), list(model.parameters())
    ws.convert(model, config=EVERYTHING, inplace=True)
    assert all(any(m is one for one in model.modules()) for m in modules)
    ws.strip(model, inplace=True)
    assert all(map(lambda a, b: a is b, model.modules(), modules))
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in ConvNet().modules()]


def test_training_flags_and_frozen_parameters_are_kept() -> None:
    model = ConvNet()
    model.stem.eval()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    converted = ws.convert(model, config=EVERYTHING)
    assert not any(m.training for m in converted.stem.modules())
    assert all(m.training for m in converted.head.modules())
    stripped = ws.strip(converted, example_inputs=torch.randn(1, 3, 8, 8))
    assert [m.training for m in stripped.modules()] == [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in stripped.parameters()] == flags
    assert stripped.stem.weight.requires_grad


def test_the_report_counts_what_was_folded_and_removed() -> None:
    vanilla = ConvNet()
    plan = ws.plan(vanilla, config=EVERYTHING)
    _, report = ws.strip_with_report(ws.convert(vanilla, plan=plan))
    assert report.layers == 4
    assert report.removed_parameters == plan.added_parameters
    assert report.parameters == plan.model_parameters
    assert report.output_difference is None


def test_progress_is_told_after_each_layer() -> None:
    steps: list[tuple[int, int]] = []
    model = ws.convert(ConvNet(), config=EVERYTHING)
    ws.strip_with_report(model, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_plan_is_kept_with_the_model_and_goes_with_strip() -> None:
    plan = ws.plan(ConvNet())
    converted = ws.convert(ConvNet(), plan=plan)
    assert Plan.from_dict(converted.we_surgery_plan) == plan
    assert not hasattr(ws.strip(converted), "we_surgery_plan")


def test_surgery_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "we_surgery"):
        ws.strip(ws.convert(ConvNet(), config=EVERYTHING))
    assert [r.message for r in caplog.records] == [
        "excited 4 of 4 weights",
        "folded 4 excited weights",
    ]


def test_new_parameters_come_from_the_global_generator() -> None:
    vanilla = ConvNet()

    def excitations(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        state = ws.convert(vanilla).state_dict()
        return {name: value for name, value in state.items() if "fc1" in name}

    once, again, other = excitations(3), excitations(3), excitations(4)
    assert once
    assert all(torch.equal(again[name], value) for name, value in once.items())
    assert not any(torch.equal(other[name], value) for name, value in once.items())


def test_a_model_on_the_meta_device_converts_and_strips_there() -> None:
    with torch.device("meta"):
        model = ConvNet()
    converted = ws.convert(model, config=EVERYTHING)
    assert all(p.is_meta for p in converted.parameters())
    stripped = ws.strip(converted)
    assert all(p.is_meta for p in stripped.parameters())
    assert list(stripped.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "lwe", "start": "paused"},
        {"mode": "lwe", "init": "preserve"},
        {"config": {"conv": "spectral_norm"}},
    ],
)
def test_a_model_on_the_meta_device_is_materialized_and_loaded(options: dict[str, Any]) -> None:
    expected = ws.convert(ConvNet(), **options)
    with torch.device("meta"):
        model = ws.convert(ConvNet(), **options)
    model.half().float()
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    dtypes = [(name, value.dtype) for name, value in model.state_dict().items()]
    assert dtypes == [(name, value.dtype) for name, value in expected.state_dict().items()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    assert ws.resume(model) == ws.resume(expected)


def test_layers_without_elements_are_converted_and_stripped() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    converted = ws.convert(model)
    assert len(list(excited_layers(converted))) == 2
    x = torch.randn(2, 4)
    assert torch.equal(ws.strip(converted, example_inputs=x)(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_surgery_in_inference_mode_gives_parameters_that_can_be_trained(inplace: bool) -> None:
    model = ConvNet()
    with torch.inference_mode():
        converted = ws.convert(model, config=EVERYTHING, inplace=inplace)
    converted(torch.randn(2, 3, 8, 8)).sum().backward()
    with torch.inference_mode():
        stripped = ws.strip(converted, example_inputs=torch.randn(2, 3, 8, 8), inplace=inplace)
    assert not any(p.is_inference() for p in [*converted.parameters(), *stripped.parameters()])
    stripped(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_default_device_or_dtype_has_no_influence() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Linear(4, 4))
    config = EVERYTHING | {"mwe": {"detach_max": False}}
    expected = ws.convert(model, config=config).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = ws.convert(model, config=config).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert (found[name].device, found[name].dtype) == (value.device, value.dtype), name


# Twice, and not at all


@pytest.mark.parametrize("inplace", [False, True])
def test_converting_twice_warns_and_changes_nothing(inplace: bool) -> None:
    model = ws.convert(ConvNet())
    before = snapshot(model)
    with pytest.warns(ws.AlreadyConvertedWarning, match="is converted already"):
        again = ws.convert(model, "we", inplace=inplace)
    assert snapshot(model) == before
    assert (again is model) == inplace
    assert list(again.state_dict()) == list(model.state_dict())


def test_converting_nothing_warns_with_the_reason() -> None:
    frozen = ConvNet().requires_grad_(False)
    with pytest.warns(ws.NothingToConvertWarning, match="none of .* for this reason: frozen"):
        ws.convert(frozen)
    ws.convert(frozen, "none")
    ws.convert(frozen, plan=ws.plan(frozen))


@pytest.mark.parametrize("inplace", [False, True])
def test_stripping_a_vanilla_model_warns_and_changes_nothing(inplace: bool) -> None:
    model = ConvNet()
    before = snapshot(model)
    with pytest.warns(ws.NothingToStripWarning, match="nothing to strip"):
        stripped = ws.strip(model, inplace=inplace)
    assert snapshot(model) == before
    assert (stripped is model) == inplace
    assert list(stripped.state_dict()) == list(model.state_dict())


def test_a_stripped_model_can_be_converted_again() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = ConvNet()
    for mode in ("lwe", "we"):
        model = ws.strip(ws.convert(model, mode), example_inputs=x)
    assert is_vanilla(model)


def test_a_decision_says_what_it_is_in_a_word() -> None:
    row = Decision("a", "weight", "conv2d", "", (4, 4, 3, 3), 1, [], "")
    words = {
        "skip": [],
        "LWE": [{"lwe": {}}],
        "LWE+MWE (standardized)": [{"standardize": {}}, {"lwe": {}}, {"mwe": {}}],
        "standardize": [{"standardize": {}}],
    }
    for word, stages in words.items():
        assert replace(row, excitation=stages).verdict == word


class Allocated(TorchDispatchMode):
    """The bytes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
        return made


def test_convert_in_place_copies_no_weight() -> None:
    model = nn.Sequential(nn.Conv2d(256, 512, 3), nn.BatchNorm2d(512), nn.Linear(1024, 1024))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    size = sum(parameter.nbytes for parameter in model.parameters())
    with Allocated() as allocated:
        ws.convert(model, "lwe+mwe", inplace=True)
    raw = {p.data_ptr() for n, p in model.named_parameters() if "excitation." not in n}
    assert raw == set(addresses)
    assert sum(allocated.storages.values()) < 0.02 * size
    with Allocated() as allocated:
        ws.convert(ws.strip(model), "lwe+mwe")
    assert sum(allocated.storages.values()) > size


# Cost


def test_strip_builds_no_excitation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ws.convert(ConvNet(), "lwe")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an excitation was built")

    monkeypatch.setattr(rows, "build_excitation", refuse)
    assert is_vanilla(ws.strip(model, inplace=True))


def test_a_strip_in_place_takes_one_more_set_of_weights_at_its_peak() -> None:
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(8)))
    ws.convert(model, "lwe", inplace=True)
    layer = model[0].raw_weight.nbytes
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        ws.strip(model, inplace=True)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 8 * layer <= most <= 11 * layer


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_of_which_nothing_was_excited_keeps_no_plan_once_stripped(inplace: bool) -> None:
    with pytest.warns(ws.errors.NothingToConvertWarning):
        converted = ws.convert(nn.Sequential(nn.ReLU()), "lwe")
    with pytest.warns(ws.NothingToStripWarning):
        stripped = ws.strip(converted, inplace=inplace)
    assert stored_plan(stripped) is None
    assert not vars(stripped).keys() - vars(nn.Sequential()).keys()
