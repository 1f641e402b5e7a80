"""One composition computed by two backends."""

from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations import (
    LWE,
    MWE,
    Composition,
    Rescale,
    Standardize,
)


def compose(
    stages: str, shape: tuple[int, ...], *, groups: int | None = None, dtype: Any = None
) -> Composition:
    """Stages by their first letters; groups are those of a transposed conv."""
    filters = shape[0] if groups is None else shape[1] * groups
    channels = shape[1] if groups is None else shape[0] // groups
    made: dict[str, Any] = {
        "s": lambda: Standardize(),
        "l": lambda: LWE(channels, reduction=4, dtype=dtype),
        "r": lambda: Rescale(torch.rand(filters) + 0.5, torch.randn(filters) / 10),
        "m": lambda: MWE(),
    }
    return Composition([made[stage]() for stage in stages], groups)


def results(composition: Composition, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    excited = composition(leaf)
    inputs = [leaf, *composition.parameters()]
    return [excited.detach(), *torch.autograd.grad(excited, inputs, upstream)]


def assert_agreement(
    composition: Composition, weight: Tensor, backend: Any, tolerance: float = 1e-5
) -> None:
    upstream = torch.randn(weight.shape, dtype=weight.dtype)
    composition.backend = "eager"
    expected = results(composition, weight, upstream)
    composition.backend = backend
    found = results(composition, weight, upstream)
    assert found[0].stride() == expected[0].stride()
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)
