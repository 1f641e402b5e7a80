"""Detects weights that were written, replaced or trained from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from we_surgery.attached.holding import Holding
from we_surgery.attached.ranks import any_rank
from we_surgery.attached.weights import AttachedWeight

SAMPLES = 64
"""Values per weight that are compared before each step."""
_A_PRIME = 7919


@dataclass(eq=False)
class Tripwire:
    """Finds writes into the model's weights, also those that move no version.

    Fused optimizers, NumPy and writes through ``.data`` leave the version of a tensor alone, so
    that a few values of each weight are compared too. On a GPU that comparison is read one step
    later, since waiting for it would stop the queue.
    """

    holding: Holding
    # Of each weight a view of some of its values, and what they should be.
    samples: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Comparisons on a GPU that have not been read: weights, flag and event.
    pending: list[tuple[list[AttachedWeight], Tensor, torch.cuda.Event]] = field(
        default_factory=list
    )

    def remember(self, weights: Sequence[AttachedWeight], step: int) -> None:
        """Remembers the weights, to compare them before the next step."""
        for same_device in _by_device(weights):
            views = [_sample(weight, step) for weight in same_device]
            values = torch.split(torch.cat(views), [view.shape[0] for view in views])
            pairs = zip(views, values, strict=True)
            self.samples |= zip(map(id, same_device), pairs, strict=True)

    def check(self, weights: Sequence[AttachedWeight]) -> None:
        """Reports the weights that differ from the remembered ones."""
        moved = [
            weight
            for weight in weights
            if weight.stamp() != weight.written or not self.holding.is_held(weight)
        ]
        if not moved:
            for same_device in _by_device(weights):
                moved += self._differing(same_device)
        if any_rank(weights, bool(moved)) and any(w.shard is not None for w in weights):
            moved = list(weights)  # the look at them is collective
        if moved:
            self.holding.report(moved)

    def _differing(self, weights: list[AttachedWeight]) -> list[AttachedWeight]:
        """The weights with a sampled value that differs from the remembered one."""
        # The views are of the weights' memory: each weight's address is that of then.
        views, values = zip(*(self.samples[id(weight)] for weight in weights), strict=True)
        now, then = torch.cat(views), torch.cat(values)
        if now.device.type != "cuda":
            return [] if torch.equal(now, then) else weights
        ready = [entry for entry in self.pending if entry[2].query()]  # type: ignore[no-untyped-call]
        self.pending = [entry for entry in self.pending if entry not in ready]
        flag = torch.zeros((), dtype=torch.bool, pin_memory=True)
        flag.copy_((now != then).any(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.pending.append((weights, flag, event))
        return [weight for found, differs, _ in ready if differs for weight in found]


def _by_device(weights: Sequence[AttachedWeight]) -> list[list[AttachedWeight]]:
    found: dict[torch.device, list[AttachedWeight]] = {}
    for weight in weights:
        found.setdefault(weight.parameter.device, []).append(weight)
    return list(found.values())


def _sample(weight: AttachedWeight, step: int) -> Tensor:
    """A view of up to 64 values spread over the weight, other ones at each step."""
    values = weight.memory
    if not (values.is_contiguous() or _is_dense(values)):
        while values.ndim > 1:
            shortest = min(range(values.ndim), key=values.shape.__getitem__)
            values = values.select(shortest, step * _A_PRIME % values.shape[shortest])
        return values
    count = values.numel()
    stride = max(count // SAMPLES, 1)
    offset = step * _A_PRIME % stride
    return values.as_strided((min(count, SAMPLES),), (stride,), values.storage_offset() + offset)


def _is_dense(values: Tensor) -> bool:
    """Whether each value lies in memory once, without gaps, as in channels_last."""
    axes = zip(values.shape, values.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in axes) + 1 == values.numel()
