"""Compositions computed together by a backend, as the attached step does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations import LWE, MWE, Composition, Rescale, Standardize
from we_surgery.excitations.compute.closed_form import excite_into, pull_back
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Pullback


def compose(stages: str, shape: tuple[int, ...], *, groups: int | None = None) -> Composition:
    """Stages by their first letters; groups are those of a transposed conv."""
    filters = shape[0] if groups is None else shape[1] * groups
    channels = shape[1] if groups is None else shape[0] // groups
    made: dict[str, Any] = {
        "s": lambda: Standardize(),
        "l": lambda: LWE(channels, reduction=4),
        "r": lambda: Rescale(torch.rand(filters) + 0.5, torch.randn(filters) / 10),
        "m": lambda: MWE(),
    }
    return Composition([made[stage]() for stage in stages], groups)


def inputs_of(composition: Composition, weight: Tensor) -> ClosedFormInputs:
    inputs = composition.closed_form(weight)
    assert inputs is not None
    return inputs


def results(
    layers: Sequence[tuple[Composition, Tensor, Tensor]],
    backend: Any,
    frozen: Sequence[bool] = (False,) * 5,
) -> list[list[Tensor | None]]:
    """Of each composition, weight and upstream gradient: W', then the gradients of W, A, a, B, b.

    ``frozen`` says which of the five are not asked for.
    """
    jobs = [(w, inputs_of(c, w), torch.empty_like(w)) for c, w, _ in layers]
    kept = excite_into(jobs, backend)
    asked = []
    for (_, weight, upstream), (_, inputs, _), own in zip(layers, jobs, kept, strict=True):
        is_there = (True, *[inputs.fc1_weight is not None] * 4)
        needed = [there and not still for there, still in zip(is_there, frozen, strict=True)]
        asked.append(Pullback(upstream.clone(), weight, inputs, own, needed))
    found = pull_back(backend, asked)
    return [[target, *own] for (_, _, target), own in zip(jobs, found, strict=True)]


def assert_close(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            scale = max(other.abs().max().item(), 1e-30)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def assert_agreement(composition: Composition, weight: Tensor, tolerance: float = 1e-5) -> None:
    """Kernels give what eager gives."""
    layer = (composition, weight, torch.randn(weight.shape))
    (found,), (expected,) = (results([layer], backend) for backend in ("triton", "eager"))
    assert_close(found, expected, tolerance)
