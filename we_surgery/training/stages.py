"""What a training loop does with single stages of a converted model.

Dynamic Sparse Training has a loss, global LWE an average, shift attention a schedule and hardening.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.attached.registry import excitation_of
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError, check_known
from we_surgery.excitations import DynamicSparse, Excitation, GlobalLWE, ShiftAttention
from we_surgery.excitations.shift_attention import HARDENINGS
from we_surgery.training.vanilla_view import inside_wrappers

Stage = TypeVar("Stage", bound=Excitation)


def stages_of(model: nn.Module, kind: type[Stage], function: str) -> list[Stage]:
    """The stages of one kind in a model."""
    attached = isinstance(model, AttachedExcitation)
    if not attached:
        model = inside_wrappers(model)
        stages = [module for module in model.modules() if isinstance(module, kind)]
        if stages:
            return stages
        attached = any(excitation_of(parameter) is not None for parameter in model.parameters())
    if attached:
        raise InputError(
            f"{function} needs a converted model, and this excitation is attached to the "
            "optimizer: its parameters are not in the model",
            "Train the converted form (`we_surgery.convert`), or after training give "
            "`excitation.converted()`.",
        )
    return []


def sparsity_loss(model: nn.Module) -> Tensor:
    """The sum of ``exp(-t)`` over all thresholds of a converted model.

    Add it to the loss, times 1e-6 to 5e-4 in the public code; larger factors give sparser weights.

    Args:
        model: converted with ``dynamic_sparse``; also inside DDP or ``torch.compile``.

    Returns:
        A scalar; 0 for a model without thresholds.

    Raises:
        InputError: the excitation is attached, so that the model has no thresholds.

    Example:
        >>> loss = criterion(model(x), y) + 5e-6 * ws.sparsity_loss(model)
    """
    stages = stages_of(model, DynamicSparse, "sparsity_loss")
    terms = [torch.exp(-stage.threshold).sum() for stage in stages]
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def average_location_nets(model: nn.Module) -> int:
    """Sets the weights of all ``averaged`` location nets of a model to their mean, not the biases.

    Call it after each optimizer step, as by
    ``optimizer.register_step_post_hook(lambda *_: ws.average_location_nets(model))``.

    Args:
        model: converted with ``attention: global`` and ``averaged``.

    Returns:
        The number of nets.

    Raises:
        InputError: the excitation is attached, so that the model has no location nets.
    """
    stages = stages_of(model, GlobalLWE, "average_location_nets")
    nets = [stage.net for stage in stages if stage.averaged]
    for weights in ([net.fc1.weight for net in nets], [net.fc2.weight for net in nets]):
        if weights:
            mean = torch.stack([weight.float() for weight in weights]).mean(0)
            for weight in weights:
                weight.copy_(mean)
    return len(nets)


def harden(model: nn.Module, how: str = "argmax") -> int:
    """Reduces each kernel of a model's shift attention to its largest position, with factor 1.

    You may train the remaining weights further. Strip then gives a dense conv with one weight per
    kernel.

    Args:
        model: converted with shift attention.
        how: ``argmax``; ``round``, as in the public code, which sets kernels without a position
            over one half to zero; or ``soft``, which undoes hardening.

    Returns:
        The number of kernels without a position over one half.

    Raises:
        InputError: ``how`` is unknown, or the excitation is attached.
    """
    check_known("hardening", how, HARDENINGS)
    stages = stages_of(model, ShiftAttention, "harden")
    for stage in stages:
        stage.hardening = how
    return sum(stage.undecided() for stage in stages)


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
