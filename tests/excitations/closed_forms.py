"""Compositions with a closed form, as modules and as functions, beside their stages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from we_surgery.excitations import (
    LWE,
    MWE,
    Composition,
    Excitation,
    Rescale,
    Standardize,
)

F64 = torch.float64
STAGES = ["s", "l", "m", "sl", "sm", "lm", "slm", "r", "lr", "sr", "slrm"]
SMALL = {
    "linear": (4, 6),
    "1d": (4, 3, 3),
    "2d": (4, 3, 3, 2),
    "3d": (3, 2, 2, 1, 3),
    "1x1": (4, 6, 1, 1),
}


def compose(
    stages: str,
    shape: tuple[int, ...],
    *,
    groups: int = 1,
    transposed: bool = False,
    detach_max: bool = True,
    dtype: torch.dtype = F64,
) -> Composition:
    """Stages by their first letters, for a layer whose weight has this shape."""
    channels = shape[0] if transposed else shape[1] * groups
    filters = shape[1] * groups if transposed else shape[0]
    made: dict[str, Callable[[], Excitation]] = {
        "s": lambda: Standardize(),
        "l": lambda: LWE(channels, groups, reduction=max(channels // 4, 1), dtype=dtype),
        "r": lambda: Rescale(torch.rand(filters, dtype=dtype) + 0.5, torch.randn(filters)),
        "m": lambda: MWE(detach_max=detach_max, dtype=dtype),
    }
    return Composition([made[stage]() for stage in stages], groups if transposed else None)


def staged(composition: Composition, weight: Tensor) -> Tensor:
    """The reference: each stage's own `excite`, differentiated by autograd."""
    return Excitation.forward(composition, weight)


def gradients(excited: Tensor, inputs: list[Tensor], upstream: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(excited, inputs, upstream, allow_unused=True))


def assert_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    """Equal up to ``tolerance`` of each tensor's largest value, and of all of them if it is 0."""
    largest = [0.0 if other is None else other.abs().max().item() for other in expected]
    for one, other, own in zip(found, expected, largest, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = max(own, 1e-3 * max(largest))
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def assert_agreement(composition: Composition, weight: Tensor, tolerance: float) -> None:
    inputs = [weight.detach().clone().requires_grad_(), *composition.parameters()]
    closed, reference = composition(inputs[0]), staged(composition, inputs[0])
    assert "ClosedForm" in type(closed.grad_fn).__name__
    assert_close([closed], [reference], tolerance)
    upstream = torch.randn_like(reference)
    found, expected = (gradients(e, inputs, upstream) for e in (closed, reference))
    assert_close(found, expected, tolerance)


def as_function(composition: Composition) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The composition as a function of a weight and its parameters, and these."""
    names = [name for name, _ in composition.named_parameters()]

    def function(weight: Tensor, *values: Tensor) -> Tensor:
        return functional_call(composition, dict(zip(names, values, strict=True)), (weight,))

    return function, [p.detach().clone().requires_grad_() for p in composition.parameters()]


def as_staged_function(composition: Composition) -> Callable[..., Tensor]:
    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = composition

        def forward(self, weight: Tensor) -> Tensor:
            return staged(self.inner, weight)

    names = [f"inner.{name}" for name, _ in composition.named_parameters()]

    def reference(weight: Tensor, *values: Tensor) -> Tensor:
        return functional_call(Staged(), dict(zip(names, values, strict=True)), (weight,))

    return reference


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(32, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 256, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.Conv2d(256, 256, 3, groups=4, bias=False),
        nn.BatchNorm2d(256),
    )
