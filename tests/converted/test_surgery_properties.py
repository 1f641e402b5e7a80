"""Convert and strip on random small models: whatever the layers, the vanilla model comes back."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import EVERYTHING, EXCITING_MODES, is_vanilla

import we_surgery as ws
from we_surgery.converted.layer import excited_layers

# Some of these models have nothing to excite in the mode that was drawn.
pytestmark = pytest.mark.filterwarnings("ignore::we_surgery.NothingToConvertWarning")

CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CHANNELS = st.sampled_from([1, 2, 4, 6])


def common_divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0]


@st.composite
def convs(draw: st.DrawFn, rank: int, inputs: int, outputs: int) -> nn.Module:
    conv, transposed, _ = CONVS[rank]
    kernel = tuple(draw(st.sampled_from([1, 3])) for _ in range(rank))
    options: dict[str, Any] = {
        "groups": draw(st.sampled_from(common_divisors(inputs, outputs))),
        "bias": draw(st.booleans()),
        "dilation": draw(st.sampled_from([1, 2])),
    }
    if draw(st.integers(0, 3)) == 0:
        return transposed(inputs, outputs, kernel, **options)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return conv(inputs, outputs, kernel, padding="same", padding_mode=mode, **options)


class Attend(nn.Module):
    """Self-attention with a residual, whose parent reads the attention's projections."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


@st.composite
def conv_chains(draw: st.DrawFn) -> tuple[list[nn.Module], tuple[int, ...]]:
    rank = draw(st.sampled_from([1, 2, 3]))
    width = first = draw(CHANNELS)
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        outputs = draw(CHANNELS)
        block = [draw(convs(rank, width, outputs))]
        if draw(st.booleans()):
            block.append(draw(st.sampled_from([CONVS[rank][2], nn.Identity]))(outputs))
        block.append(nn.ReLU())
        again = draw(st.sampled_from(["", "tied", "shared"])) if outputs == width else ""
        if again == "tied":
            twin = copy.deepcopy(block[0])
            twin.weight = block[0].weight
            block.append(twin)
        elif again == "shared":
            block.append(block[0])
        blocks += [nn.Sequential(*block)] if draw(st.booleans()) else block
        width = outputs
    pool = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d][rank - 1](1)
    head = nn.Linear(width, 3, draw(st.booleans()))
    return [*blocks, pool, nn.Flatten(), head], (2, first, *[5] * rank)


@st.composite
def token_chains(draw: st.DrawFn) -> tuple[list[nn.Module], tuple[int, ...]]:
    width = draw(st.sampled_from([2, 4, 6]))
    embedding = nn.Linear(3, width, draw(st.booleans()))
    blocks: list[nn.Module] = [embedding]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["attention", "linear", "shared", "again"]))
        if kind == "attention":
            blocks.append(Attend(width, draw(st.sampled_from([1, 2])), draw(st.booleans())))
        elif kind == "again" and len(blocks) > 1:
            blocks.append(blocks[-1])
        else:
            linear = nn.Linear(width, width, draw(st.booleans()))
            blocks += [linear, nn.GELU(), *([linear] if kind == "shared" else [])]
    return [*blocks, nn.LayerNorm(width), nn.Linear(width, 5)], (2, 4, 3)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A chain of convs, or of attention and linear layers, nested at random.

    Some of it is frozen, tied, shared, hooked, or in another mode than the rest.
    """
    torch.manual_seed(draw(st.integers(0, 100)))
    blocks, shape = draw(st.one_of(conv_chains(), token_chains()))
    model = nn.Sequential(*blocks)
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 5)) > 0)
    for module in model.modules():
        module.training = draw(st.booleans())
        if draw(st.integers(0, 5)) == 0:
            module.register_forward_hook(unchanged)
    dtype = draw(st.sampled_from(DTYPES))
    return model.to(dtype), torch.randn(shape).to(dtype)


def unchanged(module: nn.Module, inputs: Any, output: Any) -> None:
    """A hook that can be pickled."""


CONFIGS = st.one_of(
    st.builds(
        lambda mode, standardize: {"mode": mode, "standardize": standardize},
        st.sampled_from(EXCITING_MODES),
        st.sampled_from(["auto", "on", "off"]),
    ),
    st.just(EVERYTHING),
)


def description(model: nn.Module) -> list[Any]:
    """All that strip must give back but the values."""
    modules = [
        (name, type(m), m.training, len(m._forward_hooks), list(m._parameters), list(m._modules))
        for name, m in model.named_modules()
    ]
    parameters = [
        (name, p.dtype, p.shape, p.requires_grad, p.stride())
        for name, p in model.named_parameters()
    ]
    return [modules, parameters, list(model.state_dict()), repr(model)]


@given(models(), CONFIGS, st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_the_vanilla_model_comes_back_with_the_excited_weights(
    case: tuple[nn.Module, Tensor], config: dict[str, Any], inplace: bool
) -> None:
    model, x = case
    before, values = description(model), copy.deepcopy(model.state_dict())
    plan = ws.plan(model, config=config)
    assert ws.Plan.from_dict(plan.to_dict()) == plan
    converted = ws.convert(model, plan=plan, inplace=inplace)
    excited = {
        f"{name}.{parameter}": getattr(layer, parameter).detach().clone()
        for name, layer in excited_layers(converted)
        for parameter in layer.excited_parameters
    }
    assert list(excited) == [f"{row.module}.{row.parameter}" for row in plan.excited]
    reference = copy.deepcopy(converted)
    if not excited:
        return
    stripped, report = ws.strip_with_report(converted, example_inputs=x, inplace=inplace)
    assert (stripped is model) == inplace
    assert is_vanilla(stripped)
    # torch's attention takes another, fused path where no weight is computed.
    rounding = 1e-5 if any(isinstance(m, Attend) for m in model.modules()) else 0
    assert report.relative_difference <= rounding
    assert description(stripped) == before
    found = stripped.state_dict()
    tied = {other for names in ties(stripped) if names & excited.keys() for other in names}
    for name, value in values.items():
        if name in excited:
            assert torch.equal(found[name], excited[name])
        elif name not in tied:
            assert torch.equal(found[name], value)
    torch.testing.assert_close(
        stripped.eval()(x), reference.eval()(x), rtol=100 * rounding, atol=rounding
    )


def ties(model: nn.Module) -> list[set[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return list(names.values())


@given(models(), CONFIGS)
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
def test_a_training_step_reaches_the_excitations_and_strips_exactly(
    case: tuple[nn.Module, Tensor], config: dict[str, Any]
) -> None:
    model, x = case
    converted = ws.convert(model, config=config).train()
    if is_vanilla(converted):
        return
    optimizer = torch.optim.SGD(converted.parameters(), 0.01)
    converted(x).float().square().sum().backward()
    for _, layer in excited_layers(converted):
        for name in layer.excited_parameters:
            excitation = getattr(layer, name.removesuffix("weight") + "excitation")
            assert all(p.grad is not None for p in excitation.parameters())
    optimizer.step()
    _, report = ws.strip_with_report(converted, example_inputs=x)
    rounding = 1e-5 if any(isinstance(m, Attend) for m in model.modules()) else 0
    assert report.relative_difference <= rounding


@pytest.mark.slow
@given(models(), CONFIGS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_planning_changes_nothing_and_says_the_same_again(
    case: tuple[nn.Module, Tensor], config: dict[str, Any]
) -> None:
    model, x = case
    before, values = description(model), copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    random = torch.get_rng_state()
    plan = ws.plan(model, config=config)
    assert ws.plan(model, config=config) == plan
    recorded = ws.plan(model, config=config, example_inputs=x)
    assert {row.layer for row in recorded.decisions} >= {row.layer for row in plan.excited}
    assert description(model) == before
    assert [parameter._version for parameter in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@given(models(), CONFIGS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_converting_again_and_stripping_again_do_nothing(
    case: tuple[nn.Module, Tensor], config: dict[str, Any]
) -> None:
    model, _ = case
    converted = ws.convert(model, config=config)
    if is_vanilla(converted):
        return
    with pytest.warns(ws.errors.AlreadyConvertedWarning):
        again = ws.convert(converted, config=config)
    assert description(again) == description(converted)
    assert same(again.state_dict(), converted.state_dict())
    stripped = ws.strip(again)
    with pytest.warns(ws.errors.NothingToStripWarning):
        assert same(ws.strip(stripped).state_dict(), stripped.state_dict())


@given(models(), CONFIGS, st.sampled_from(["module", "state_dict"]))
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_all_ways_to_strip_agree(
    case: tuple[nn.Module, Tensor], config: dict[str, Any], kind: str
) -> None:
    model, _ = case
    converted = ws.convert(drop_hooks_of(model), config=config)
    if is_vanilla(converted):
        return
    stripped = ws.strip(converted)
    expected = stripped.state_dict()
    assert same(ws.strip_state_dict(converted.state_dict()), expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        if kind == "module":
            ws.save(converted, path)
            assert same(
                ws.strip(ws.load(path, allow=["test_surgery_properties"])).state_dict(), expected
            )
        else:
            torch.save({"state_dict": converted.state_dict(), "epoch": 3}, path)
            assert same(ws.strip_state_dict(torch.load(path)), expected)


@given(models(), st.sampled_from(list(ws.MODES)))
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_preserve_keeps_the_outputs(case: tuple[nn.Module, Tensor], mode: str) -> None:
    model, x = case[0].double().eval(), case[1].double()
    converted = ws.convert(model, mode, init="preserve", example_inputs=x).eval()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-6)


def same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order, and bit-equal values."""
    return list(state) == list(other) and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype
        for name, value in state.items()
    )


def drop_hooks_of(model: nn.Module) -> nn.Module:
    """Without its hooks, which a file may not hold."""
    for module in model.modules():
        module._forward_hooks.clear()
    return model
