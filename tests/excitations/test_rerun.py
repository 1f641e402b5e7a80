"""Stages that the closed form does not know: run again in the backward pass, none of it kept."""

import copy
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import we_surgery as ws
from we_surgery.converted import WEConv2d
from we_surgery.excitations import MWE, Composition, Excitation, Standardize

F64 = torch.float64


class Gate(Excitation):
    """A gate of two convs with a parameter they share, and a scale that is a buffer."""

    name: ClassVar[str] = "gate"
    order: ClassVar[int] = 30

    def __init__(self, channels: int, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels, dtype=dtype)
        self.second = nn.Linear(channels, channels, dtype=dtype)
        self.second.bias = self.first.bias
        self.register_buffer("scale", torch.tensor(0.7, dtype=dtype))
        self.runs = 0

    def excite(self, weight: Tensor) -> Tensor:
        self.runs += 1
        pooled = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
        first, second = (
            torch.addmm(fc.bias.to(weight.dtype), pooled, fc.weight.to(weight.dtype).t())
            for fc in (self.first, self.second)
        )
        gate = torch.sigmoid(first * torch.tanh(second)) * self.scale
        return weight * gate.view(*gate.shape, *[1] * (weight.ndim - 2))


class Spectral(Excitation):
    """The weight over an estimate of its largest singular value, which training improves."""

    name: ClassVar[str] = "spectral"
    order: ClassVar[int] = 5
    u: Tensor

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.register_buffer("u", torch.nn.functional.normalize(torch.ones(filters), dim=0))

    def advance(self, weight: Tensor) -> None:
        matrix = weight.flatten(1)
        u = self.u.to(matrix.dtype)
        self.u.copy_(torch.nn.functional.normalize(matrix @ (matrix.t() @ u), dim=0))

    def excite(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        return weight / torch.linalg.vector_norm(matrix.t() @ self.u.to(matrix.dtype))


def staged(composition: Composition, weight: Tensor) -> Tensor:
    """The reference: the stages under autograd."""
    return Excitation.forward(composition, weight)


def made(shape: tuple[int, ...] = (4, 3, 3, 3), dtype: torch.dtype = F64) -> Composition:
    torch.manual_seed(0)
    return Composition([Standardize(), MWE(dtype=dtype), Gate(shape[1], dtype)])


def gradients(excited: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(excited, inputs, upstream, allow_unused=True))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 3), (4, 3, 3, 2), (3, 2, 2, 1, 3)])
def test_values_and_gradients_are_those_of_the_stages_to_the_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    composition = made(shape, dtype)
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    inputs = [weight, *composition.parameters()]
    found, expected = composition(weight), staged(composition, weight)
    assert type(found.grad_fn).__name__ == "RerunExcitationBackward"
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    with torch.autocast("cpu", torch.bfloat16):
        again = gradients(found, inputs, upstream)
    for one, other in zip(again, gradients(expected, inputs, upstream), strict=True):
        assert torch.equal(one, other)


def test_a_transposed_weight_is_regrouped_again() -> None:
    composition = Composition([Gate(2)], transposed_groups=2)
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    upstream = torch.randn_like(weight)
    found, expected = (
        gradients(excited, [weight], upstream)[0]
        for excited in (composition(weight), staged(composition, weight))
    )
    assert torch.equal(found, expected)


def as_function(composition: Composition) -> tuple[Callable[..., Tensor], list[Tensor]]:
    names = [name for name, _ in composition.named_parameters()]

    def function(weight: Tensor, *values: Tensor) -> Tensor:
        return functional_call(composition, dict(zip(names, values, strict=True)), (weight,))

    return function, [p.detach().clone().requires_grad_() for p in composition.parameters()]


def test_the_gradient_is_right_and_can_be_differentiated() -> None:
    composition = Composition([MWE(detach_max=False, dtype=F64), Gate(2)])
    function, parameters = as_function(composition)
    weight = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    assert gradcheck(function, (weight, *parameters))
    assert gradgradcheck(function, (weight, *parameters))


@pytest.mark.parametrize("frozen", ["weight", "parameters"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    composition = made()
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    inputs = [weight, *composition.parameters()]
    upstream = torch.randn_like(weight)
    expected = gradients(composition(weight), inputs, upstream)
    kept = [weight] if frozen == "parameters" else inputs[1:]
    for tensor in inputs:
        tensor.requires_grad_(any(tensor is k for k in kept))
    composition(weight).backward(upstream)
    for tensor, gradient in zip(inputs, expected, strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or torch.equal(tensor.grad, gradient)


def test_a_hook_on_a_parameter_sees_its_gradient_once() -> None:
    composition = made()
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    seen: list[Tensor] = []
    for tensor in (weight, composition.get_submodule("gate.first").weight):
        tensor.register_hook(seen.append)
    composition(weight).sum().backward()
    assert len(seen) == 2


def test_a_stage_that_passes_no_gradient_on_gives_none() -> None:
    class Detached(Gate):
        def excite(self, weight: Tensor) -> Tensor:
            return super().excite(weight).detach()

    weight = torch.randn(4, 3, dtype=F64, requires_grad=True)
    Composition([Detached(3)])(weight).sum().backward()
    assert weight.grad is None


def test_a_weight_changed_between_the_passes_is_noticed() -> None:
    composition = made()
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    excited = composition(weight)
    with torch.no_grad():
        composition.get_submodule("gate.second").weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        excited.sum().backward()


# In a model


def conv_of(stages: list[Excitation]) -> nn.Module:
    """A conv and a norm, the conv excited by these stages."""
    torch.manual_seed(0)
    vanilla = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
    model = ws.convert(vanilla, config={"mode": "mwe"})
    model[0].excitation = Composition(stages)
    return model


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """All memory a forward pass has allocated and not given back, as the allocator counts it."""
    model(x).sum().backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        output = model(x)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del output
    return allocated


def test_the_excited_weight_is_kept_alone() -> None:
    vanilla = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
    model = conv_of([Gate(32, torch.float32)])
    x = torch.randn(2, 32, 6, 6)
    kept = kept_bytes(model, x) - kept_bytes(vanilla, x)
    assert 1 <= kept / vanilla[0].weight.nbytes <= 1.08


def test_two_losses_share_one_excited_weight() -> None:
    gate = Gate(32, torch.float32)
    model = conv_of([gate]).eval()
    other = copy.deepcopy(model)
    images = torch.randn(2, 1, 32, 5, 5)
    with ws.cached(model):
        losses = [model(image).square().sum() for image in images]
    assert gate.runs == 1
    sum(losses).backward()
    sum(other(image).square().sum() for image in images).backward()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same.grad, rtol=1e-4, atol=1e-4)


def test_training_advances_a_stage_and_nothing_else_does() -> None:
    model = conv_of([Spectral(32)])
    layer = model[0]
    assert isinstance(layer, WEConv2d)
    stage = layer.excitation.get_submodule("spectral")
    x = torch.randn(1, 32, 5, 5)

    def moves(act: Callable[[], object]) -> bool:
        before = stage.u.clone()
        act()
        return not torch.equal(before, stage.u)

    assert moves(lambda: model(x))
    with torch.no_grad():
        assert not moves(lambda: model(x))
    assert not moves(lambda: ws.strip(model))
    loss = model(x).square().sum()
    assert not moves(loss.backward)
    model.eval()
    assert not moves(lambda: model(x))


def test_the_backward_pass_has_the_buffers_of_its_forward_pass() -> None:
    model = conv_of([Spectral(32), Gate(32, torch.float32)])
    other = copy.deepcopy(model)
    x = torch.randn(2, 32, 5, 5)
    loss = model(x).square().sum()
    stage = model[0].excitation.get_submodule("spectral")
    first = stage.u.clone()
    with torch.no_grad():
        stage.u.fill_(1)  # as if another forward pass had gone by, or DDP had broadcast
    loss.backward()
    assert not torch.equal(stage.u, first)
    other(x).square().sum().backward()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad)


def test_a_stage_advances_with_each_read_and_once_in_a_cached_block() -> None:
    torch.manual_seed(0)
    model = conv_of([Spectral(32)])
    stage = model[0].excitation.get_submodule("spectral")
    x = torch.randn(1, 32, 5, 5)
    with ws.cached(model):
        model(x)
        after_one = stage.u.clone()
        model(x)
    assert torch.equal(stage.u, after_one)
    model(x)
    assert not torch.equal(stage.u, after_one)


# Transformations


def test_it_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    composition = Composition([Spectral(4), MWE(), Gate(3, torch.float32)])
    other = copy.deepcopy(composition)
    compiled = torch.compile(composition, fullgraph=True, backend="aot_eager")
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    same = weight.detach().clone().requires_grad_()
    for _ in range(2):
        compiled(weight).square().sum().backward()
        other(same).square().sum().backward()
    torch.testing.assert_close(weight.grad, same.grad)
    torch.testing.assert_close(composition.spectral.u, other.spectral.u)
    torch.compiler.reset()


def test_torch_func_transforms_run_the_stages() -> None:
    composition = Composition([Spectral(4).double(), Gate(3)])
    weights = torch.randn(2, 4, 3, 3, dtype=F64)

    def loss(weight: Tensor) -> Tensor:
        return composition(weight).square().sum()

    before = composition.spectral.u.clone()
    found = vmap(grad(loss))(weights)
    assert torch.equal(composition.spectral.u, before)
    for weight, one in zip(weights, found, strict=True):
        alone = weight.clone().requires_grad_()
        staged(composition, alone).square().sum().backward()
        torch.testing.assert_close(one, alone.grad)
