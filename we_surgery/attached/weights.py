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
from we_surgery.errors import InputError
from we_surgery.excitations import Backend, Composition
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept

HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Excited:
    """What the forward pass of one weight keeps for its backward pass."""

    terms: ClosedFormInputs | None = None  # of the closed form
    kept: Kept | None = None  # by it: a few numbers per filter
    edge: GradientEdge | None = None  # autograd's node of W', where there is no closed form
    is_identity: bool = False  # as of a paused excitation


@dataclass(eq=False)
class AttachedWeight:
    """One Parameter of the model, which holds W' = E(raw), and the raw weight."""

    layer: str  # its name in the plan
    places: tuple[tuple[str, str], ...]  # (module, parameter); several for tied layers
    parameter: nn.Parameter
    raw: nn.Parameter
    excitation: Composition
    shard: Shard | None = None
    backend: Backend = "auto"
    parameters: tuple[nn.Parameter, ...] = field(init=False)  # of the excitation
    excited: Excited = field(default_factory=Excited)
    written: tuple[int, int] | None = None  # the stamp after W' was written
    gradient_version: int = 0  # of the raw weight's gradient when it was assigned
    pulled_back: tuple[int, int] | None = None  # the gradient of W' then: identity and version

    def __post_init__(self) -> None:
        self.parameters = tuple(self.excitation.parameters())

    @property
    def memory(self) -> Tensor:
        """The Parameter's memory on this rank, detached."""
        return self.parameter.detach() if self.shard is None else local(self.parameter)

    @property
    def memory_for_gradient(self) -> Tensor | None:
        """The Parameter's memory if a gradient of the raw weight can lie there for a step.

        Not where another process may read it, such as an actor of reinforcement learning.
        """
        memory, raw = self.memory, local(self.raw)
        if memory.dtype != raw.dtype or memory.stride() != raw.stride():
            return None
        return None if memory.device.type == "cpu" and memory.is_shared() else memory  # type: ignore[no-untyped-call]

    def stamp(self) -> tuple[int, int]:
        """Version and address of the Parameter's memory on this rank."""
        memory = self.parameter if self.shard is None else self.memory
        return memory._version, memory.data_ptr()

    def gradient_stamp(self) -> tuple[int, int] | None:
        """Identity and version of the Parameter's gradient; None if the raw one has it too."""
        gradient = self.parameter.grad
        if gradient is None or gradient is self.raw.grad:
            return None
        return id(gradient), local(gradient)._version

    @property
    def name(self) -> str:
        """The Parameter's first qualified name in the model."""
        return ".".join(part for part in self.places[0] if part)


@dataclass(eq=False)
class ExcitationParameter:
    """A trained parameter of an excitation, which is in the optimizer during a step only."""

    name: str  # of its weight, a colon, and its name in that excitation
    parameter: nn.Parameter
    entry: nn.Parameter  # in the optimizer: itself, or the same memory as a DTensor
    group: int  # that it joins, or that its weight is in
    is_apart: bool = False  # trained by the companion, since no group can take it
    replicated: Callable[[Tensor], nn.Parameter] | None = None  # makes a DTensor of a tensor
    states: list[Any] = field(default_factory=list)  # of the optimizer and those it wraps


def raw_like(parameter: nn.Parameter, values: Tensor, shard: Shard | None = None) -> nn.Parameter:
    """A raw weight with these values, whole ones, in float32 for half precision.

    A raw weight in bfloat16 would hardly move: at a learning rate of 1e-4 an update is below
    half of a last bit for two of three values.
    """
    dtype = torch.float32 if values.dtype in HALF else values.dtype
    if shard is None:
        raw = nn.Parameter(torch.empty_like(values, dtype=dtype).copy_(values))
    else:
        rows = torch.empty_like(local(parameter), dtype=dtype).copy_(shard.cut(values))
        raw = nn.Parameter(shard.joined(rows, parameter))
    # What optimizers and frameworks mark a Parameter with.
    raw.__dict__.update(parameter.__dict__)
    return raw


def optimizer_of(
    parameter: nn.Parameter, optimizers: Iterable[Optimizer], layer: str
) -> Optimizer | None:
    """The optimizer that trains the layer's Parameter."""
    found = [
        optimizer
        for optimizer in optimizers
        if any(parameter is other for group in optimizer.param_groups for other in group["params"])
    ]
    if len(found) > 1:
        raise InputError(
            f"the weight of layer {layer!r} is in {len(found)} of the optimizers",
            "Give each weight to one optimizer.",
        )
    return found[0] if found else None
