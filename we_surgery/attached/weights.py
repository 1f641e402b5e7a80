"""The records of an attached excitation: its weights, and the parameters that excite them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.optim import Optimizer

from we_surgery.attached.shards import Shard, local
from we_surgery.excitations import Backend, Composition
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept


@dataclass(slots=True)
class Excited:
    """What the forward pass of one weight leaves for its backward pass.

    Attributes:
        terms: the closed form's inputs; None for a weight computed under autograd.
        kept: the closed form's own intermediates, a few numbers per filter.
        edge: autograd's node of W'; None for the closed form, and where nothing is trained.
        is_identity: whether W' is the raw weight, as of a paused excitation.
    """

    terms: ClosedFormInputs | None = None
    kept: Kept | None = None
    edge: GradientEdge | None = None
    is_identity: bool = False


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
        shard: how both are divided among ranks; None where they are whole.
        backend: what computes E; see :func:`we_surgery.attach`.
        parameters: those of the excitation.
        excited: what the last computation of W' left for the backward pass.
        written: the :meth:`stamp` after W' was written.
        gradient_version: of ``raw``'s gradient when it was assigned.
    """

    layer: str
    places: tuple[tuple[str, str], ...]
    parameter: nn.Parameter
    raw: nn.Parameter
    excitation: Composition
    shard: Shard | None = None
    backend: Backend = "auto"
    parameters: tuple[nn.Parameter, ...] = field(init=False)
    excited: Excited = field(default_factory=Excited)
    written: tuple[int, int] | None = None
    gradient_version: int = 0

    def __post_init__(self) -> None:
        self.parameters = tuple(self.excitation.parameters())

    @property
    def memory(self) -> Tensor:
        """The Parameter's memory on this rank, detached."""
        return self.parameter.detach() if self.shard is None else local(self.parameter)

    def stamp(self) -> tuple[int, int]:
        """Version and address of the Parameter's memory on this rank."""
        memory = self.parameter if self.shard is None else self.memory
        return memory._version, memory.data_ptr()

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
        entry: what stands for it in the optimizer: itself, or for a sharded weight the same
            memory as a DTensor.
        group: the index of the parameter group it joins, or of its weight's.
        is_apart: whether no group can take it, so that a companion optimizer trains it.
        replicated: makes a DTensor of a tensor, for a sharded weight.
        states: what the optimizer and those it wraps keep for it, one after the other; None
            where one keeps nothing yet.
    """

    name: str
    parameter: nn.Parameter
    entry: nn.Parameter
    group: int
    is_apart: bool = False
    replicated: Callable[[Tensor], nn.Parameter] | None = None
    states: list[Any] = field(default_factory=list)


def raw_like(parameter: nn.Parameter, values: Tensor, shard: Shard | None = None) -> nn.Parameter:
    """A raw weight with these values, whole ones, in float32 for half precision.

    A raw weight in bfloat16 would hardly move: at a learning rate of 1e-4 an update is below
    half of a last bit for two of three values.
    """
    dtype = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    if shard is None:
        raw = nn.Parameter(torch.empty_like(values, dtype=dtype).copy_(values))
    else:
        rows = torch.empty_like(local(parameter), dtype=dtype).copy_(shard.cut(values))
        raw = nn.Parameter(shard.joined(rows, parameter))
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
