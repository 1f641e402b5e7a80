"""Convert and strip: what they return, what they check, and that a failure leaves no trace."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import EVERYTHING, EXCITING_MODES, ZOO_INPUT, ConvNet, Zoo, is_vanilla

import we_surgery as ws
from we_surgery import grafting, plans
from we_surgery.excitations import Composition, WeightLayout, build_excitation
from we_surgery.layers import excited_layers
from we_surgery.plans import Decision, Plan


def snapshot(model: nn.Module) -> list[Any]:
    """All that a failed surgery must leave as it was: classes, keys, identities, flags, values."""
    modules = [
        # What is kept between two reads of an excited weight comes and goes.
        (n, type(m), id(m), m.training, [name for name in vars(m) if name != "kept"])
        for n, m in model.named_modules()
    ]
    parameters = [
        (name, id(p), p.data_ptr(), p.requires_grad, p.grad, p.detach().clone().tolist())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]


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


# What cannot be operated on


class DistributedDataParallel(nn.Module):
    """Stands for torch's: it is refused by the name of its class."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("operate", [ws.convert, ws.strip])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "wrapped in DistributedDataParallel"),
        (nn.DataParallel, "wrapped in DataParallel"),
        (lambda m: torch.compile(m, backend="eager"), "wrapped by torch.compile"),
        (lambda m: torch.jit.trace(m.eval(), torch.randn(1, 3, 8, 8)), "TorchScript"),
    ],
    ids=["ddp", "dp", "compile", "trace"],
)
# Deprecated, and still in use; the warnings are about torch's own norm as well.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_wrapped_models_are_refused_with_the_way_inside(
    operate: Callable[[nn.Module], nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    message: str,
) -> None:
    inside = ws.convert(ConvNet()) if operate is ws.strip else ConvNet()
    with pytest.raises(ws.InputError, match=message):
        operate(wrap(inside))


def test_a_model_that_cannot_be_copied_is_operated_on_in_place() -> None:
    model = ConvNet()
    model.cache = model.stem.weight * 2
    with pytest.raises(ws.SurgeryError, match="cannot be copied") as error:
        ws.convert(model)
    assert "inplace=True" in error.value.cure
    assert is_vanilla(model)
    ws.convert(model, inplace=True)
    ws.strip(model, inplace=True)


@pytest.mark.parametrize("arguments", [{"mode": "we"}, {"config": {}}, {"rules": [ws.Rule("*")]}])
def test_a_plan_beside_a_mode_config_or_rules_is_refused(arguments: dict[str, Any]) -> None:
    plan = ws.plan(ConvNet())
    with pytest.raises(ws.InputError, match="both a plan and a mode, config, rules or"):
        ws.convert(ConvNet(), plan=plan, **arguments)


# Plans that do not fit


def change_row(plan: Plan, layer: str, **changes: Any) -> Plan:
    rows = [replace(row, **changes) if row.layer == layer else row for row in plan.decisions]
    return replace(plan, decisions=tuple(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "stemm"}, "a layer 'stemm' that the model has not; did you mean 'stem'"),
        ({"parameter": "bias"}, "a layer 'stem.bias' that the model has not"),
        ({"shape": (8, 3, 5, 5)}, "shape (8, 3, 5, 5) and 1 groups, the model as conv2d"),
        ({"groups": 3}, "3 groups, the model"),
        ({"kind": "conv_transpose2d"}, "as conv_transpose2d of shape"),
        ({"excitation": [{"lew": {}}]}, "no excitation called 'lew'"),
        ({"excitation": [{"lwe": {"reduction": 0}}]}, "reduction must be a positive integer"),
        ({"module": "head"}, "'head'"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(
    changes: dict[str, Any], message: str, inplace: bool
) -> None:
    model = ConvNet()
    plan = change_row(ws.plan(model), "stem", **changes)
    before = snapshot(model)
    with pytest.raises(ws.InputError) as error:
        ws.convert(model, plan=plan, inplace=inplace)
    assert message in error.value.cause
    assert snapshot(model) == before


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(ws.InputError, match="made for this model"):
        ws.convert(ConvNet(), plan=ws.plan(Zoo()))


def test_a_plan_that_names_a_layer_twice_is_refused() -> None:
    plan = ws.plan(ConvNet())
    twice = replace(plan, decisions=(*plan.decisions, plan.decisions[0]))
    with pytest.raises(ws.InputError, match="names layer 'stem' twice"):
        ws.convert(ConvNet(), plan=twice)


def test_a_plan_that_excites_what_cannot_be_excited_is_refused() -> None:
    plan = ws.plan(ConvNet())
    model = ConvNet()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ws.InputError, match="'head'"):
        ws.convert(model, plan=plan)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("left_alone", ["0", "1"])
def test_a_plan_that_excites_one_of_two_tied_layers_is_refused(left_alone: str) -> None:
    plan = change_row(ws.plan(tied()), left_alone, excitation=[])
    with pytest.raises(ws.InputError, match="which is the same Parameter"):
        ws.convert(tied(), plan=plan)


def test_a_plan_that_excites_tied_layers_differently_is_refused() -> None:
    plan = change_row(ws.plan(tied()), "1", excitation=[{"mwe": {"epsilon": 0.2}}])
    with pytest.raises(ws.InputError, match="tied layers '0' and '1' in different ways"):
        ws.convert(tied(), plan=plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(value: float) -> None:
    model = ConvNet()
    model.head.weight.data[0, 0] = value
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ws.SurgeryError, match="weight of layer 'head' holds 1 non-finite"):
        ws.convert(model, inplace=True)
    assert [type(m) for m in model.modules()] == classes


# Failures on the way


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("fails_at", range(6))
def test_a_failure_at_any_graft_leaves_the_model_as_it_was(
    fails_at: int, init: Literal["paper", "preserve"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Zoo()
    model.attention.eval()
    plan = ws.plan(model, "lwe")
    assert len(plan.excited) == 5
    before, calls, real = snapshot(model), [], grafting.excite

    def excite(*arguments: Any) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(grafting, "excite", excite)
    if fails_at == 5:
        ws.convert(model, plan=plan, init=init, inplace=True)
        assert snapshot(model) != before
        return
    with pytest.raises(KeyboardInterrupt):
        ws.convert(model, plan=plan, init=init, inplace=True)
    assert snapshot(model) == before
    assert not hasattr(model, "we_surgery_plan")


def trained() -> nn.Module:
    """A converted model with gradients and a tied pair, as strip finds it after training."""
    model = ConvNet()
    model.twin = nn.Linear(12, 5)
    model.twin.weight = model.head.weight
    converted = ws.convert(model, config=EVERYTHING)
    converted(torch.randn(2, 3, 8, 8)).square().sum().backward()
    return converted


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_failure_at_any_restored_layer_leaves_the_model_as_it_was(
    fails_at: int, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    before, calls, real = snapshot(model), [], grafting.restore

    def restore(layer: nn.Module) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(layer)
        real(layer)

    monkeypatch.setattr(grafting, "restore", restore)
    with pytest.raises(KeyboardInterrupt):
        ws.strip(model, inplace=inplace)
    assert snapshot(model) == before


class Noisy(Composition):
    """An excitation that never gives the same weight twice."""

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) + torch.rand(())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_fold_that_is_not_deterministic_fails_and_changes_nothing(inplace: bool) -> None:
    model = trained()
    stages = build_excitation([{"mwe": {}}], WeightLayout((5, 12))).stages
    model.head.excitation = model.twin.excitation = Noisy(stages)
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="layer 'head' is not bit-equal"):
        ws.strip(model, inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_fold_that_is_not_finite_fails_and_changes_nothing(value: float, inplace: bool) -> None:
    model = trained()
    model.grouped.raw_weight.data[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="folded weight of layer 'grouped' holds"):
        ws.strip(model, inplace=inplace)
    assert repr(snapshot(model)) == repr(before)  # NaN is not equal to itself, but prints the same


class Bypass(nn.Module):
    """A parent that reads the raw weight, behind the excitation's back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.conv, "raw_weight", self.conv.weight)
        return nn.functional.conv2d(x, weight, self.conv.bias)


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_that_differ_fail_the_strip_and_change_nothing(inplace: bool) -> None:
    model = ws.convert(nn.Sequential(Bypass(), nn.MultiheadAttention(4, 2)), config=EVERYTHING)
    model.forward = model[0].forward
    model[0].conv.raw_weight.grad = torch.ones_like(model[0].conv.raw_weight)
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="stripped model's outputs differ by"):
        ws.strip(model, example_inputs=torch.randn(1, 3, 5, 5), inplace=inplace)
    assert snapshot(model) == before
    assert hasattr(model, "we_surgery_plan")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_conversion_that_is_not_proven_changes_nothing(inplace: bool) -> None:
    model = nn.Sequential(Bypass(), nn.Conv2d(4, 4, 3))
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match=r"reads '0\.conv\.raw_weight' itself"):
        ws.convert(model, example_inputs=torch.randn(1, 3, 7, 7), inplace=inplace)
    assert snapshot(model) == before


class RunsChildren(nn.Module):
    """Owns a kernel, and runs whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return nn.functional.conv2d(x, self.kernel)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_excitation_that_would_run_on_activations_is_found(inplace: bool) -> None:
    model = RunsChildren()
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match=r"'kernel_excitation.*' runs on activations"):
        ws.convert(model, example_inputs=torch.randn(1, 3, 7, 7), inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_example_inputs_that_do_not_fit_change_nothing(inplace: bool) -> None:
    model = trained()
    before = snapshot(model)
    with pytest.raises(ws.InputError, match="the model fails on the example inputs"):
        ws.strip(model, example_inputs=torch.randn(1, 7, 5, 5), inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: prune.l1_unstructured(m.stem, "raw_weight", 0.5),
            "layer 'stem' was changed after its conversion: its 'raw_weight' is no Parameter",
        ),
        (
            lambda m: torch.nn.utils.parametrizations.weight_norm(m.stem, "raw_weight"),
            "'raw_weight' is no Parameter",
        ),
        (
            lambda m: torch.nn.utils.parametrize.register_parametrization(
                m.head, "bias", nn.Identity()
            ),
            "layer 'head' was changed after its conversion: its class is ParametrizedWELinear",
        ),
    ],
    ids=["pruned", "parametrized", "parametrized bias"],
)
def test_a_layer_that_was_changed_after_its_conversion_is_not_stripped_silently(
    change: Callable[[nn.Module], object], message: str
) -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING)
    change(model)
    with pytest.raises(ws.SurgeryError, match=message):
        ws.strip(model, inplace=True)


def test_a_decision_says_what_it_is_in_a_word() -> None:
    row = Decision("a", "weight", "conv2d", "", (4, 4, 3, 3), 1, [], "")
    words = {
        "skip": [],
        "LWE": [{"lwe": {}}],
        "LWE+MWE (standardized)": [{"standardize": {}}, {"lwe": {}}, {"mwe": {}}],
        "standardize": [{"standardize": {}}],
    }
    for word, recipe in words.items():
        assert replace(row, excitation=recipe).verdict == word


def test_an_interrupted_strip_can_be_repeated() -> None:
    model = trained()
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(x)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ws.strip_with_report(model, inplace=True, progress=interrupt)
    assert torch.equal(ws.strip(model, example_inputs=x, inplace=True).eval()(x), expected)


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

    monkeypatch.setattr(plans, "build_excitation", refuse)
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
