"""Whether torch's operations or Triton kernels compute the closed form in the attached step.

Both do the same arithmetic in float32 and differ by rounding. On a GPU, launches dominate the cost:
eager has about sixty per layer, the kernels at most seven for all layers together.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from we_surgery.errors import InputError, check_known
from we_surgery.excitations.compute import formulas
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Pullback

Backend = Literal["auto", "eager", "triton"]

logger = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """Raises an :class:`InputError` for a backend that does not exist or cannot be imported."""
    check_known("backend", backend, get_args(Backend))
    if backend == "triton" and not has_triton():
        raise InputError(
            "Triton is not installed, so its kernels cannot run",
            "Use `auto` or `eager`; Triton comes with torch on Linux.",
        )


def runs_on_kernels(backend: Backend, weight: Tensor, inputs: ClosedFormInputs) -> bool:
    """Whether the kernels compute this weight; otherwise eager does.

    While a CUDA graph is captured, eager does: a replay would read the kernels' tables after they
    are freed, and launches cost little in a graph.
    """
    if backend == "eager" or weight.is_meta or torch._C._len_torch_dispatch_stack():
        return False
    if weight.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return False
    elif backend == "auto" or not is_interpreted():
        return False
    if not has_triton() or not kernels().supports(weight, inputs):
        return False
    return backend == "triton" or _agrees(weight.device)


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, which it does for tests."""
    if not has_triton():
        return False
    import triton

    is_on: bool = triton.knobs.runtime.interpret
    return is_on


def kernels() -> Any:
    """The kernels' module; importing it needs Triton."""
    from we_surgery.excitations.compute import triton_backend

    return triton_backend


@functools.cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernels run on this device and agree with eager on three small layers."""
    try:
        difference = _largest_difference(device)
    except Exception as error:
        logger.warning("Triton fails on %s, eager is used: %s", device, error)
        return False
    if not difference < 1e-2:  # far above TF32's rounding, far below a mistake
        logger.warning("Triton's kernels are off by %.1g on %s, eager is used", difference, device)
        return False
    return True


@torch.no_grad()
def _largest_difference(device: torch.device) -> float:
    """Between kernels and eager, relative to each result's largest value.

    The layers have different stages, and each kernel works on all of them at once. No random
    numbers are drawn.
    """

    def wave(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, device=device, dtype=torch.float32).mul_(1.7).sin_().view(shape)

    def fcs(hidden: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return wave(hidden, channels), wave(hidden), wave(channels, hidden), wave(channels)

    layers = [
        (
            wave(24, 40, 3, 3),
            ClosedFormInputs(*fcs(5, 40), standardize_epsilon=1e-5, mwe_epsilon=0.1),
        ),
        (wave(5, 7), ClosedFormInputs(*fcs(35, 7), standardize_epsilon=1e-5)),
        (wave(17, 33, 2), ClosedFormInputs(mwe_epsilon=0.1)),
    ]
    found = [[excited] for excited, _ in kernels().excite(layers)]
    expected: list[list[Tensor | None]] = []
    asked = []
    for weight, inputs in layers:
        excited, kept = formulas.excite(weight, inputs)
        upstream, needed = weight.cos(), (True, *[inputs.fc1_weight is not None] * 4)
        asked.append(Pullback(upstream, weight, inputs, kept, needed))
        gradients = formulas.differentiate(upstream.clone(), weight, inputs, kept, needed)
        expected.append([excited, *gradients])
    for own, gradients in zip(found, kernels().differentiate(asked), strict=True):
        own.extend(gradients)
    differences = [
        (one - other).abs().max() / other.abs().max()
        for own, others in zip(found, expected, strict=True)
        for one, other in zip(own, others, strict=True)
        if other is not None
    ]
    return float(torch.stack(differences).max())
