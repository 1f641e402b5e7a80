"""An excited weight that is not kept for the backward pass but computed again in it.

What a conv or linear keeps of its weight is replaced by a note of how to compute it, through
torch's hooks on saved tensors. The excited weight then costs no memory between the passes, for
one more computation of it in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from we_surgery.excitations import Excitation
from we_surgery.excitations.compute.rerun import advanced_buffers, holding
from we_surgery.excitations.repeatable import Versions


@dataclass(frozen=True, eq=False, slots=True)
class _Note:
    """How to get one view of an excited weight back."""

    excitation: Excitation
    raw: Tensor
    versions: Versions
    advanced: dict[str, Tensor]
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def rebuild(self) -> Tensor:
        self.versions.refuse_modified()
        with torch.no_grad(), holding(self.excitation, self.advanced):
            excited = self.excitation(self.raw).to(self.dtype)
        return torch.as_strided(excited, self.size, self.stride, self.offset)


def can_recompute() -> bool:
    """Whether saved tensors may be replaced here.

    Under ``torch.compile`` the compiler decides what is kept; under activation checkpointing or
    offloading, whose hooks would be hidden, nothing of the layer is kept to begin with.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


class HandedWeight(NamedTuple):
    """An excited weight and what it was computed from."""

    excitation: Excitation
    raw: Tensor
    """``[O, I, *K]``"""
    excited: Tensor
    """Of the same shape, perhaps cast to another dtype."""


@contextlib.contextmanager
def recomputed_in_backward(weights: Iterable[HandedWeight]) -> Iterator[None]:
    """Whatever autograd would keep of these weights in this context, it computes again instead."""
    # Not the excited weights themselves: autograd keeps the hooks, and the hooks this.
    sources = {
        (excited.untyped_storage().data_ptr(), excited.dtype): (
            excitation,
            raw,
            Versions(raw, excitation.parameters()),
            advanced_buffers(excitation),
        )
        for excitation, raw, excited in weights
    }

    def pack(tensor: Tensor) -> Tensor | _Note:
        found = sources.get((tensor.untyped_storage().data_ptr(), tensor.dtype))
        if found is None:
            return tensor
        layout = (tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return _Note(*found, tensor.dtype, *layout)

    def unpack(kept: Any) -> Any:
        return kept.rebuild() if isinstance(kept, _Note) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
