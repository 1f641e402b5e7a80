"""The records of an attached excitation: its weights, and the parameters that excite them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from we_surgery.attached.transform import Excited, differentiate, excite
from we_surgery.excitations import Composition


@dataclass(eq=False)
class AttachedWeight:
    """One Parameter of the model and the raw weight it is excited from.

    Attributes:
        layer: the layer's name in the plan, for messages.
        places: the names under which the model holds the Parameter, the first one first:
            (module, parameter).
        parameter: the model's own Parameter, which holds W' = E(raw).
        raw: what the optimizer trains in its place.
        excitation: E.
        excited: what the last computation of W' left for the backward pass.
        version: of ``parameter`` after W' was written.
        address: of its memory then.
        gradient_version: of ``raw``'s gradient when it was assigned.
    """

    layer: str
    places: tuple[tuple[str, str], ...]
    parameter: nn.Parameter
    raw: nn.Parameter
    excitation: Composition
    excited: Excited = field(default_factory=Excited)
    version: int = -1
    address: int = 0
    gradient_version: int = 0

    @property
    def name(self) -> str:
        """The Parameter's first qualified name in the model."""
        return ".".join(part for part in self.places[0] if part)


@dataclass(eq=False)
class ExcitationParameter:
    """A trained parameter of an excitation, which is in the optimizer during a step only.

    Attributes:
        name: the qualified name of its weight, a colon, and its name in that excitation.
        parameter: the parameter.
        group: the index of the parameter group it joins.
        states: what the optimizer and those it wraps keep for it, one after the other; None
            where one keeps nothing yet.
    """

    name: str
    parameter: nn.Parameter
    group: int
    states: list[Any] = field(default_factory=list)


def write(weights: Sequence[AttachedWeight], *, advance: bool) -> None:
    """Computes W' = E(raw) into each Parameter's own memory.

    Args:
        weights: the weights.
        advance: as in :func:`~we_surgery.attached.transform.excite`.
    """
    jobs = [(w.excitation, w.raw, w.parameter.detach()) for w in weights]
    for weight, excited in zip(weights, excite(jobs, advance=advance), strict=True):
        weight.excited = excited
        weight.version = weight.parameter._version
        weight.address = weight.parameter.data_ptr()


def pull_back(weights: Sequence[AttachedWeight]) -> None:
    """Assigns the gradients of raw weights and excitations from those of the Parameters.

    Args:
        weights: those whose Parameter has a gradient.
    """
    jobs = []
    for weight in weights:
        gradient = weight.parameter.grad
        assert gradient is not None
        jobs.append((weight.excitation, weight.raw, weight.excited, gradient))
    differentiate(jobs)
    for weight in weights:
        if weight.raw.grad is not None:
            weight.gradient_version = weight.raw.grad._version


def drop_gradient(weight: AttachedWeight) -> None:
    """Clears the raw weight's gradient, and the Parameter's if the optimizer cleared the raw one.

    SAM does between its two halves.
    """
    gradient, weight.raw.grad = weight.raw.grad, None
    if gradient is None:
        weight.parameter.grad = None
    elif gradient._version != weight.gradient_version and not gradient.any():
        assert weight.parameter.grad is not None
        weight.parameter.grad.zero_()


def raw_like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A raw weight with these values, in float32 for half precision.

    A raw weight in bfloat16 would hardly move: at a learning rate of 1e-4 an update is below
    half of a last bit for two of three values.
    """
    dtype = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    raw = nn.Parameter(torch.empty_like(values, dtype=dtype).copy_(values), requires_grad=True)
    # What optimizers and frameworks mark a Parameter with.
    raw.__dict__.update(parameter.__dict__)
    return raw


def optimizer_of(parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> Optimizer | None:
    """The optimizer that trains the Parameter."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(parameter is other for other in group["params"]):
                return optimizer
    return None
