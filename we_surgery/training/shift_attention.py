"""Shift attention in training: its inverse temperature, step by step, and what its layers take."""

from __future__ import annotations

import math

import torch
from torch import nn

from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError
from we_surgery.excitations import ShiftAttention
from we_surgery.training.stages import stages_of
from we_surgery.training.vanilla_view import inside_wrappers


class ShiftAttentionSchedule:
    """Multiplies the inverse temperature of a model's shift attention by a factor per step.

    It goes from ``start`` to ``end`` in ``steps`` calls of :meth:`step` and stays there (the public
    code's ImageNet run raises it further). The temperature T is part of the model's state dict and
    the schedule has no state: a resumed run makes it again with ``resume=True``.

    Args:
        model: with shift attention; also inside DDP or ``torch.compile``.
        steps: optimizer steps from ``start`` to ``end``.
        start: T before the first step; 20 for CIFAR and 0.15 for ImageNet in the public code.
        end: T after the last; 70 and 60 there.
        resume: keep the T of the model's state.

    Raises:
        InputError: the model has no shift attention, or a number is out of range.

    Example:
        >>> schedule = ws.ShiftAttentionSchedule(model, steps=300 * len(loader))
        >>> for x, y in loader:
        ...     train_step(x, y)
        ...     schedule.step()
        >>> ws.harden(model)
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        start: float = 20.0,
        end: float = 70.0,
        *,
        resume: bool = False,
    ) -> None:
        if steps < 1 or not 0 < start <= end < math.inf:
            raise InputError(
                "`steps` must be at least 1, and 0 < `start` <= `end`, got "
                f"{steps}, {start} and {end}",
                "Correct them.",
            )
        self.stages = stages_of(model, ShiftAttention, "ShiftAttentionSchedule")
        if not self.stages:
            raise InputError(
                "the model has no shift attention", "Convert it with `conv: shift_attention`."
            )
        self.factor = (end / start) ** (1 / steps)
        self.end = end
        if not resume:
            with torch.no_grad():
                for stage in self.stages:
                    stage.inverse_temperature.fill_(start)

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each optimizer step."""
        for stage in self.stages:
            stage.inverse_temperature.mul_(self.factor).clamp_(max=self.end)


def shift_attention_words(model: nn.Module) -> float:
    """Returns the number of 32-bit words that a hardened model with shift attention needs.

    Each of its layers needs one weight and one position per kernel, or with ``shared`` one position
    per input channel (:meth:`ShiftAttention.stored_words`). Every other parameter is one word.
    """
    words = 0.0
    counted: set[int] = set()
    for weight in excited_weights(inside_wrappers(model)):
        stages = [s for s in weight.excitation.stages if isinstance(s, ShiftAttention)]
        counted.update(id(parameter) for parameter in weight.excitation.parameters())
        if stages and id(weight.raw) not in counted:
            counted.add(id(weight.raw))
            words += stages[0].stored_words(weight.raw)
    others = (p for p in inside_wrappers(model).parameters() if id(p) not in counted)
    return words + sum(parameter.numel() for parameter in others)
