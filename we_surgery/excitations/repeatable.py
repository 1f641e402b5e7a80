"""Graph nodes that may be walked back through more than once.

The tensors that autograd saves for a node are freed by the first backward pass. An excited weight
that several losses share must outlast it, so its node keeps what it needs by itself: the weight
and the parameters, which live in the model anyway, and a few numbers a filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def keep(ctx: Any, weight: Tensor, others: Sequence[Tensor | None]) -> None:
    """Keeps tensors with a node of an autograd function, to be had back from :func:`kept`."""
    ctx.is_repeatable = True
    ctx.tensors = (weight, *others)
    ctx.versions = versions(weight, others)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What :func:`keep` was given: tensors and None.

    Raises:
        RuntimeError: a tensor was written to since, as autograd raises for what it saves.
    """
    tensors: tuple[Any, ...] = ctx.tensors
    refuse_modified(ctx.versions, versions(tensors[0], tensors[1:]))
    return tensors


def versions(weight: Tensor, others: Sequence[Tensor | None]) -> list[int]:
    """The version counters of a weight and of those other tensors that are trained."""
    # Not those of buffers, which DDP broadcasts before each forward pass.
    moving = (tensor for tensor in others if tensor is not None and tensor.requires_grad)
    return [weight._version, *(tensor._version for tensor in moving)]


def refuse_modified(before: Sequence[int], now: Sequence[int]) -> None:
    """Raises a ``RuntimeError`` where version counters of the two passes differ."""
    if before != now:
        raise RuntimeError(
            "a raw weight or a parameter of its excitation was modified by an inplace "
            "operation between the forward pass that excited it and this backward pass"
        )
