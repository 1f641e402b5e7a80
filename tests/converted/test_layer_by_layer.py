"""A strip that puts one fold after the other into place: the same model, in less memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery.converted import excite
from we_surgery.converted import strip as stripping
from we_surgery.excitations import Composition, WeightLayout, build_excitation


class Attending(nn.Module):
    """Two excited weights in one layer, one of them in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.stem = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.attention.q_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.stem(x))
        return self.attention(x, x[..., :6], x[..., :6], need_weights=False)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convs": (ConvNet, (2, 3, 8, 8)),
    "tied and attention": (Attending, (2, 3, 8)),
    "graph": (lambda: fx.symbolic_trace(nn.Sequential(ConvNet())), (2, 3, 8, 8)),
}


def converted(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    return ws.convert(make(), config=EVERYTHING).eval(), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_it_gives_the_model_of_any_strip(name: str, inplace: bool) -> None:
    model, x = converted(name)
    expected, output = ws.strip(model), model(x)
    parameters = [id(parameter) for parameter in model.parameters() if parameter.numel() > 1]
    told: list[tuple[int, int]] = []
    stripped, report = ws.strip_with_report(
        model,
        inplace=inplace,
        layer_by_layer=True,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(step, report.layers) for step in range(1, report.layers + 1)]
    assert is_vanilla(stripped)
    assert (stripped is model) is inplace
    assert not inplace or {id(p) for p in model.parameters()} < set(parameters)
    assert list(stripped.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(stripped.state_dict()[key], value), key
    assert torch.equal(stripped(x), output)
    assert inplace or torch.equal(model(x), output)


def test_its_peak_is_little_more_than_one_weight() -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    # From the model's own memory on: what a profiler has not seen made it does not see freed.
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        model = nn.Sequential(*(nn.Conv2d(512, 512, 3) for _ in range(4)))
        ws.convert(model, "lwe+mwe", inplace=True)
        size = sum(parameter.nbytes for parameter in model.parameters())
        ws.strip(model, inplace=True, layer_by_layer=True)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    layer = model[0].weight.nbytes
    assert size + layer <= most < size + 1.7 * layer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_interruption_leaves_a_model_that_computes_what_it_did(
    name: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = converted(name)
    expected, output = ws.strip(model), model(x)
    calls: list[nn.Module] = []
    real = excite.restore_owner

    def restore(layer: nn.Module) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(layer)
        real(layer)

    with monkeypatch.context() as context:
        context.setattr(excite, "restore_owner", restore)
        with pytest.raises(KeyboardInterrupt):
            ws.strip(model, inplace=True, layer_by_layer=True)
    assert torch.equal(model(x), output)
    ws.strip(model, inplace=True, layer_by_layer=True)
    assert is_vanilla(model)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


class Noisy(Composition):
    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) + 1e-6 * torch.rand(())


def random_head(model: nn.Module) -> None:
    model.head.excitation = Noisy(build_excitation([{"mwe": {}}], WeightLayout((5, 12))).stages)


def endless_head(model: nn.Module) -> None:
    model.head.raw_weight.data[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "message"), [(random_head, "not bit-equal"), (endless_head, "non-finite")]
)
def test_what_cannot_be_proven_changes_nothing(
    spoil: Callable[[nn.Module], None], message: str
) -> None:
    model = converted("convs")[0]
    spoil(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ws.SurgeryError, match=message) as caught:
        ws.strip(model, inplace=True, layer_by_layer=True)
    assert "'head'" in caught.value.cause
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_outputs_cannot_be_compared_at_its_end() -> None:
    model, x = converted("convs")
    with pytest.raises(ws.InputError, match="cannot be rolled back") as caught:
        ws.strip(model, example_inputs=x, inplace=True, layer_by_layer=True)
    assert "layer_by_layer" in caught.value.cure
    assert not is_vanilla(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksums_tell_one_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = stripping._checksum(weight)
    monkeypatch.setattr(stripping, "_HASHED_AT_A_TIME", 100)
    assert stripping._checksum(weight.contiguous()) == expected
    weight[5, 4, 2, 2] *= -1
    assert stripping._checksum(weight) != expected
    assert stripping._checksum(weight.double().float()) != expected
