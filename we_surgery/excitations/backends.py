"""Who computes the closed form: torch's operations one by one, compiled ones, or Triton kernels.

All do the same arithmetic in float32 and differ by rounding. On a GPU it is launches that cost:
eager has some sixty a layer, the kernels three to six.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from we_surgery.excitations import formulas
from we_surgery.excitations.terms import Kept, Terms

Backend = Literal["auto", "eager", "inductor", "triton"]

logger = logging.getLogger(__name__)


class Arithmetic(NamedTuple):
    """The two directions; see :mod:`~we_surgery.excitations.formulas`."""

    excite: Callable[[Tensor, Terms], tuple[Tensor, Kept]]
    differentiate: Callable[
        [Tensor, Tensor, Terms, Kept, Sequence[bool]], tuple[Tensor | None, ...]
    ]


EAGER = Arithmetic(formulas.excite, formulas.differentiate)


def arithmetic(backend: Backend, filters: Tensor, terms: Terms) -> Arithmetic:
    """What computes one weight.

    Eager, whatever is asked for, under ``torch.compile`` and any dispatch mode, which must see
    the operations, on tensors without memory, and where the kernels do not know the device, the
    dtype or the composition.

    Args:
        backend: ``auto`` takes the kernels on a GPU where they agree with eager, and eager
            everywhere else.
        filters: ``[O, I, *K]``, in full precision.
        terms: its composition.
    """
    if backend == "eager" or torch.compiler.is_compiling() or filters.is_meta:
        return EAGER
    if torch._C._len_torch_dispatch_stack():
        return EAGER
    if backend == "inductor":
        presence = tuple(term is None for term in terms)
        key = (filters.shape, filters.stride(), filters.dtype, filters.device, presence)
        return _compiled(key)
    if not filters.is_cuda and (backend == "auto" or not is_interpreted()):
        return EAGER
    if not has_triton() or not _with_kernels().supports(filters, terms):
        return EAGER
    if backend == "auto" and not _can_trust_kernels(filters.device):
        return EAGER
    kernels: Arithmetic = _with_kernels().ARITHMETIC
    return kernels


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


def _with_kernels() -> Any:
    from we_surgery.excitations import triton_backend

    return triton_backend


@functools.cache
def _compiled(key: Any) -> Arithmetic:
    # A compiler gives up on a function of too many shapes, and a network has dozens: each shape
    # has a function of its own.
    def compiled(function: types.FunctionType) -> Any:
        own = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__
        )
        return torch.compile(own, fullgraph=True, dynamic=False)

    return Arithmetic(*(compiled(function) for function in EAGER))  # type: ignore[arg-type]


def _can_trust_kernels(device: torch.device) -> bool:
    # A check would wait for the GPU, which a capture forbids.
    if not _agrees.cache_info().currsize and torch.cuda.is_current_stream_capturing():
        return False
    return _agrees(device)


@functools.cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernels run on this device and give what eager gives, on a small layer."""
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
    """Of all results, relative to each one's largest value; without drawing random numbers."""

    def wave(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, device=device, dtype=torch.float32).mul_(1.7).sin_().view(shape)

    rows, channels, hidden = 24, 40, 5
    terms = Terms(
        standardize_epsilon=torch.tensor(1e-5, device=device),
        fc1_weight=wave(hidden, channels),
        fc1_bias=wave(hidden),
        fc2_weight=wave(channels, hidden),
        fc2_bias=wave(channels),
        mwe_epsilon=torch.tensor(0.1, device=device),
    )
    weight = wave(rows, channels, 3, 3)
    gradient = weight.cos()
    results: list[list[Tensor]] = []
    for excite, differentiate in (EAGER, _with_kernels().ARITHMETIC):
        excited, kept = excite(weight, terms)
        found = differentiate(gradient.clone(), weight, terms, kept, (True,) * 5)
        results.append([excited, *(tensor for tensor in found if tensor is not None)])
    return max(
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(*results, strict=True)
    )
