"""Graph nodes that may be walked back through more than once.

The tensors that autograd saves for a node are freed by the first backward pass. An excited weight
that several losses share must outlast it, so its node keeps what it needs by itself, and says so by
``ctx.is_repeatable``: the weight and the parameters, which live in the model anyway, and a few
numbers a filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


class Versions:
    """The version counters of a weight and of those other tensors that are trained, as they were.

    Args:
        weight: the raw weight.
        others: tensors and None.
    """

    def __init__(self, weight: Tensor, others: Iterable[Tensor | None]) -> None:
        # Not those of buffers, which DDP broadcasts before each forward pass. What was trained is
        # asked now: it may be frozen before the backward pass.
        moving = (tensor for tensor in others if tensor is not None and tensor.requires_grad)
        self._known = [(tensor, tensor._version) for tensor in (weight, *moving)]

    def refuse_modified(self) -> None:
        """Raises a ``RuntimeError`` where one was written to, as autograd does."""
        if any(tensor._version != version for tensor, version in self._known):
            raise RuntimeError(
                "a raw weight or a parameter of its excitation was modified by an inplace "
                "operation between the forward pass that excited it and this backward pass"
            )


class Remembered:
    """What one excited weight was computed from, for as long as its node lives.

    Args:
        weight: the raw weight.
        others: tensors and None.
    """

    def __init__(self, weight: Tensor, others: Sequence[Tensor | None]) -> None:
        self._weight, self._others = weight, others
        self._versions = Versions(weight, others)

    def tensors(self) -> tuple[Any, ...]:
        """The weight and the others.

        Raises:
            RuntimeError: one was written to since.
        """
        self._versions.refuse_modified()
        return self._weight, *self._others
