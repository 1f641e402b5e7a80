"""Processes that train copies of one model: they begin equal, and are kept equal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from we_surgery.attached.weights import AttachedWeight

EVERY = 100
"""Steps between two broadcasts. Excitations under autograd may round differently on two ranks."""


def has_ranks() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def are_copies(weights: Sequence[AttachedWeight]) -> bool:
    """Whether all ranks excite the same weights; collective.

    The parts of a pipeline do not.
    """
    described = repr([(weight.name, tuple(weight.raw.shape)) for weight in weights])
    own = hashlib.sha256(described.encode()).hexdigest()
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return len(set(found)) == 1


@torch.no_grad()
def broadcast(weights: Sequence[AttachedWeight]) -> None:
    """Gives all ranks the raw weights and excitations of rank 0; collective."""
    tensors: dict[int, Tensor] = {}
    for weight in weights:
        own = [*weight.excitation.parameters(), *weight.excitation.buffers()]
        if weight.shard is None:  # the rows of a sharded one are of one and the same weight
            own.append(weight.raw)
        tensors |= {id(tensor): tensor.detach() for tensor in own}
    for tensor in tensors.values():
        if dist.get_backend() != "nccl" or tensor.is_cuda:
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            if whole is not tensor:
                tensor.copy_(whole)
