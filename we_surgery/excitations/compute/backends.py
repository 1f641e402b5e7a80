"""Who computes the closed form: torch's operations one by one, compiled ones, or Triton kernels.

All do the same arithmetic in float32 and differ by rounding. On a GPU it is launches that cost:
eager has some sixty a layer; the kernels have at most seven, for one layer or for many at once.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from we_surgery.errors import InputError, near_matches
from we_surgery.excitations import formulas
from we_surgery.excitations.compute.terms import Kept, Pullback, Terms

Backend = Literal["auto", "eager", "inductor", "triton"]

logger = logging.getLogger(__name__)


class Arithmetic(NamedTuple):
    """The two directions, of any number of weights; see :mod:`~we_surgery.excitations.formulas`."""

    excite: Callable[[Sequence[tuple[Tensor, Terms]]], list[tuple[Tensor, Kept]]]
    differentiate: Callable[[Sequence[Pullback]], list[tuple[Tensor | None, ...]]]


def _one_by_one(excite: Callable[..., Any], differentiate: Callable[..., Any]) -> Arithmetic:
    return Arithmetic(
        lambda weights: [excite(*weight) for weight in weights],
        lambda pullbacks: [differentiate(*pullback) for pullback in pullbacks],
    )


EAGER = _one_by_one(formulas.excite, formulas.differentiate)


def arithmetic(backend: Backend, filters: Tensor, terms: Terms) -> Arithmetic:
    """What computes one weight.

    Eager, whatever is asked for, under ``torch.compile`` and any dispatch mode, which must see
    the operations, on tensors without memory, and where the kernels do not know the device, the
    dtype or the composition. So it is in the capture of a CUDA graph too: a replay would read
    the kernels' tables after they are gone, and in a graph launches cost little.

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
    if filters.is_cuda and torch.cuda.is_current_stream_capturing():
        return EAGER
    if not has_triton() or not _with_kernels().supports(filters, terms):
        return EAGER
    if backend == "auto" and not _agrees(filters.device):
        return EAGER
    kernels: Arithmetic = _with_kernels().ARITHMETIC
    return kernels


def check_backend(backend: str) -> None:
    """Raises an :class:`InputError` for a backend that does not exist here."""
    known = get_args(Backend)
    if backend not in known:
        raise InputError(
            f"there is no backend {backend!r}{near_matches(str(backend), known)}",
            f"Use one of: {', '.join(known)}.",
        )
    if backend == "triton" and not has_triton():
        raise InputError(
            "Triton is not installed, so its kernels cannot run",
            "Use `auto`, `eager` or `inductor`; Triton comes with torch on Linux.",
        )


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
    from we_surgery.excitations.compute import triton_backend

    return triton_backend


@functools.cache
def _compiled(key: Any) -> Arithmetic:
    # A compiler gives up on a function of too many shapes, and a network has dozens: each shape
    # has a function of its own.
    def compiled(function: Any) -> Any:
        own = types.FunctionType(
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
        )
        return torch.compile(own, fullgraph=True, dynamic=False)

    return _one_by_one(compiled(formulas.excite), compiled(formulas.differentiate))


@functools.cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernels run on this device and give what eager gives, on two small layers."""
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

    layers = [
        (
            wave(rows, channels, *kernel),
            Terms(
                fc1_weight=wave(hidden, channels),
                fc1_bias=wave(hidden),
                fc2_weight=wave(channels, hidden),
                fc2_bias=wave(channels),
                standardize_epsilon=1e-5,
                mwe_epsilon=0.1,
            ),
        )
        for rows, channels, hidden, kernel in ((24, 40, 5, (3, 3)), (5, 7, 35, ()))
    ]
    results: list[list[Tensor]] = []
    for excite, differentiate in (EAGER, _with_kernels().ARITHMETIC):
        excited = excite(layers)
        pullbacks = [
            Pullback(weight.cos(), weight, terms, kept, (True,) * 5)
            for (weight, terms), (_, kept) in zip(layers, excited, strict=True)
        ]
        gradients = itertools.chain(*differentiate(pullbacks))
        results.append([weight for weight, _ in excited])
        results[-1] += [tensor for tensor in gradients if tensor is not None]
    return max(
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(*results, strict=True)
    )
