"""Graph nodes that may be walked back through more than once.

The tensors that autograd saves for a node are freed by the first backward pass. An excited weight
that several losses share must outlast it, so its node keeps what it needs by itself, and says so by
``ctx.is_repeatable``: the weight and the parameters, which live in the model anyway, and a few
numbers a filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Remembered:
    """What one excited weight was computed from, for as long as its node lives.

    Args:
        weight: the raw weight.
        others: tensors and None.
    """

    def __init__(self, weight: Tensor, others: Sequence[Tensor | None]) -> None:
        self._weight, self._others = weight, others
        self._versions = versions(weight, others)

    def tensors(self) -> tuple[Any, ...]:
        """The weight and the others.

        Raises:
            RuntimeError: one was written to since, as autograd raises for what it saves.
        """
        refuse_modified(self._versions, versions(self._weight, self._others))
        return self._weight, *self._others


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
