"""Keeps the copies of one model on several processes equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from we_surgery.attached.weights import AttachedWeight
from we_surgery.errors import AttachmentError

EVERY = 100
"""Steps between two broadcasts. Excitations under autograd may round differently on two ranks."""


class Copies:
    """The processes that train copies of one model."""

    def __init__(self) -> None:
        self.have_met = False
        self.group: Any = None  # on the host, so that no GPU is waited for
        self._are_copies = False

    def meet(self, weights: Sequence[AttachedWeight]) -> bool:
        """Gives all ranks the weights of rank 0, the first time that there are ranks; collective.

        True if it was the first time.
        """
        if self.have_met or not _has_ranks():
            return False
        self.have_met = True
        self._are_copies = _are_copies(weights)
        if self._are_copies:
            broadcast(weights)
            if dist.is_gloo_available():
                self.group = dist.new_group(backend="gloo")
        return True

    def are_due(self, step: int) -> bool:
        """Whether the weights are broadcast once more before this step."""
        return self._are_copies and _has_ranks() and step % EVERY == EVERY - 1

    def raise_together(self, error: AttachmentError | None) -> None:
        """Raises on all ranks if there is an error on one: the others would wait for it forever."""
        if self.group is not None and _has_ranks():
            errors = torch.tensor(float(error is not None))
            dist.all_reduce(errors, group=self.group)
            if error is None and errors:
                raise AttachmentError(
                    "the model's weights were changed outside of the optimizer's step on another "
                    "rank",
                    "The error of that rank names the layer. Make the same change on all ranks.",
                )
        if error is not None:
            raise error


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _are_copies(weights: Sequence[AttachedWeight]) -> bool:
    """Whether all ranks excite the same weights (not so in a pipeline); collective."""
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


def any_rank(weights: Iterable[AttachedWeight], flag: bool) -> bool:
    """Whether it is true on any rank that shares these weights; collective for sharded ones."""
    groups = {id(w.shard.group): w.shard for w in weights if w.shard is not None}
    for shard in groups.values():
        votes = torch.tensor([float(flag)], device=shard.mesh.device_type)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=shard.group)
        flag = bool(votes)
    return flag
