"""Weights sharded by FSDP2: each rank holds and excites its own rows.

A weight ``[O, I, *K]`` is sharded along O, so each rank has whole filters. The closed form works
filter by filter, with two exceptions: the gradients of LWE's layers are summed over the ranks, and
MWE's maximum is taken over them. Other excitations, and transposed convs (whose first axis is not
that of filters), are gathered, computed on each rank and sliced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from we_surgery._util.views import view_of
from we_surgery.errors import InputError


@dataclass(frozen=True)
class Shard:
    """How a weight is sharded."""

    mesh: Any
    placements: tuple[Any, ...]
    group: Any
    first: int
    rows: int

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's rows."""
        return whole[self.first : self.first + self.rows]

    def joined(self, rows: Tensor, like: Tensor) -> Tensor:
        """The DTensor whose rows these are, of the shape and strides of ``like``."""
        from torch.distributed.tensor import DTensor

        joined: Tensor = DTensor.from_local(
            rows,
            self.mesh,
            self.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return joined

    def replicated(self, tensor: Tensor) -> nn.Parameter:
        """The same memory as a DTensor Parameter that each rank holds whole.

        An optimizer that computes many tensors together takes no plain ones beside DTensors.
        """
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * self.mesh.ndim
        whole = DTensor.from_local(tensor.detach(), self.mesh, everywhere, run_check=False)
        return nn.Parameter(whole, requires_grad=tensor.requires_grad)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def shard_of(parameter: Tensor, name: str) -> Shard | None:
    """How a Parameter is sharded; None if it is not."""
    if not is_sharded(parameter):
        return None
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ByDim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor: Any = parameter
    placements = tuple(tensor.placements)
    divided = [dim for dim, place in enumerate(placements) if not isinstance(place, Replicate)]
    if len(divided) != 1 or placements[divided[0]] != ByDim(0):
        raise InputError(
            f"{name!r} is sharded as {placements}; only sharding by rows is supported",
            "Use `fully_shard` with its default placement, or skip the layer by a rule.",
        )
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, placements
    )
    group = tensor.device_mesh.get_group(divided[0])
    return Shard(tensor.device_mesh, placements, group, offset[0], shape[0])


def local(tensor: Tensor) -> Tensor:
    """The memory of this process, detached."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor
    with torch.no_grad():
        rows: Tensor = sharded.to_local()
    return rows


def whole(tensor: Tensor) -> Tensor:
    """All of it; collective for a DTensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor
    with torch.no_grad():
        full: Tensor = sharded.full_tensor()
    return full.detach()


def put(target: Tensor, values: Tensor, shard: Shard | None) -> None:
    """Copies the whole values, or this rank's part of them, into a raw weight."""
    if shard is None:
        target.detach().copy_(values)
    elif is_sharded(values):
        local(target).copy_(local(values))
    else:
        local(target).copy_(shard.cut(values))


def whole_model(model: nn.Module) -> nn.Module:
    """A view of a sharded model with whole Parameters and without FSDP's hooks, for reading it.

    Collective. It holds a second copy of the weights, for as long as it is referred to.
    """
    parameters: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        values = whole(parameter) if is_sharded(parameter) else None
        if values is not None:
            parameters[id(parameter)] = nn.Parameter(values, parameter.requires_grad)

    from torch.distributed.fsdp import FSDPModule

    def class_of(module: nn.Module) -> type[nn.Module]:
        # FSDP2 derives a class from FSDPModule and the layer's own.
        return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)

    def adapt(module: nn.Module, view: nn.Module) -> None:
        if isinstance(module, FSDPModule):
            view.__dict__["_forward_hooks"] = type(module._forward_hooks)()
            view.__dict__["_forward_pre_hooks"] = type(module._forward_pre_hooks)()
        for name, own in view._parameters.items():
            view._parameters[name] = parameters.get(id(own), own)

    return view_of(model, class_of, adapt)


def share_again(model: nn.Module) -> None:
    """Frees the whole weights that a forward pass without a backward pass has left."""
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def largest_over_ranks(values: Sequence[Tensor], group: Any) -> Tensor:
    """The maximum of each 0-d tensor over the ranks, ``[len(values)]``; collective."""
    stacked = torch.stack([value.float() for value in values])
    dist.all_reduce(stacked, dist.ReduceOp.MAX, group=group)
    return stacked


def sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Sums the gradients of the parameters over the ranks, in one message; collective."""
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
