"""What a training loop does with the stages of a converted model: a loss, an average, hardening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.attached.registry import excitation_of
from we_surgery.errors import InputError, near_matches
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


@dataclass(frozen=True)
class Hardening:
    """What :func:`harden` did.

    Attributes:
        layers: layers hardened.
        kernels: their kernels; of shared positions one for each input channel.
        undecided: those without a position over one half, which ``round`` makes zero as a whole.
    """

    layers: int
    kernels: int
    undecided: int


def harden(model: nn.Module, how: str = "argmax") -> Hardening:
    """Reduces each kernel of a model's shift attention to its largest position, with factor 1.

    You may train the remaining weights further. Strip then gives a dense conv with one weight per
    kernel.

    Args:
        model: converted with shift attention.
        how: ``argmax``; ``round``, as in the public code, which sets kernels without a position
            over one half to zero; or ``soft``, which undoes hardening.

    Raises:
        InputError: ``how`` is unknown, or the excitation is attached.
    """
    if how not in HARDENINGS:
        raise InputError(
            f"there is no hardening {how!r}{near_matches(how, HARDENINGS)}",
            f"Use one of: {', '.join(HARDENINGS)}.",
        )
    stages = stages_of(model, ShiftAttention, "harden")
    for stage in stages:
        stage.hardening = how
    return Hardening(
        layers=len(stages),
        kernels=sum(stage.attention.flatten(2).shape[:2].numel() for stage in stages),
        undecided=sum(stage.undecided() for stage in stages),
    )
