"""Convert and strip on random small models: whatever the layers, the vanilla model comes back."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import EVERYTHING, EXCITING_MODES, is_vanilla

import we_surgery as ws
from we_surgery.layers import excited_layers

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


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A chain of convs, norms and a head, nested at random, some of it frozen, tied or hooked."""
    torch.manual_seed(draw(st.integers(0, 100)))
    rank = draw(st.sampled_from([1, 2, 3]))
    width = first = draw(CHANNELS)
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        outputs = draw(CHANNELS)
        block = [draw(convs(rank, width, outputs))]
        if draw(st.booleans()):
            block.append(draw(st.sampled_from([CONVS[rank][2], nn.Identity]))(outputs))
        block.append(nn.ReLU())
        if draw(st.booleans()) and outputs == width:
            twin = copy.deepcopy(block[0])
            twin.weight = block[0].weight
            block.append(twin)
        blocks += [nn.Sequential(*block)] if draw(st.booleans()) else block
        width = outputs
    pool = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d][rank - 1](1)
    model = nn.Sequential(*blocks, pool, nn.Flatten(), nn.Linear(width, 3, draw(st.booleans())))
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 5)) > 0)
    for module in model.modules():
        module.training = draw(st.booleans())
        if draw(st.integers(0, 5)) == 0:
            module.register_forward_hook(lambda *_: None)
    dtype = draw(st.sampled_from(DTYPES))
    return model.to(dtype), torch.randn(2, first, *[5] * rank).to(dtype)


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
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
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
    assert report.output_difference == 0
    assert description(stripped) == before
    found = stripped.state_dict()
    tied = {other for names in ties(stripped) if names & excited.keys() for other in names}
    for name, value in values.items():
        if name in excited:
            assert torch.equal(found[name], excited[name])
        elif name not in tied:
            assert torch.equal(found[name], value)
    assert torch.equal(stripped.eval()(x), reference.eval()(x))


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
    assert report.output_difference == 0
