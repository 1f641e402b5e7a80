"""Excited weights, computed once for a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Excitation


@contextlib.contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Computes each excited weight of a converted model once for a block of code.

    Outside of such a block each read of an excited weight computes it. Inside, the first read
    computes it and later reads get the same tensor, as with
    ``torch.nn.utils.parametrize.cached()``. The end of the block forgets all of them, also after
    an exception; in nested blocks, the end of the outermost one. Use it for inference over many
    batches, and for a forward pass that reads a weight several times.

    Inside the block a weight is not computed again when its values change, so do not call
    ``optimizer.step()`` there. Its graph is shared by all reads: add the losses up and call
    ``backward()`` once, or pass ``retain_graph=True``; activation checkpointing does not work
    across reads. Reads with gradients, without gradients, and in train and eval
    mode are kept apart. The block holds for the thread that entered it; other threads compute at
    each read, as do ``torch.compile``, ``torch.func`` transforms, tracing and CUDA graph capture.

    Args:
        model: a converted model; other models are left alone.

    Example:
        >>> with torch.no_grad(), ws.cached(model):
        ...     outputs = [model(batch) for batch in batches]
    """
    block = Block(model)
    _here.blocks.append(block)
    try:
        yield
    finally:
        _here.blocks.remove(block)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Computes at each read, also inside :func:`cached`: a proof must not use cached weights."""
    hidden, _here.blocks = _here.blocks, []
    try:
        yield
    finally:
        _here.blocks = hidden


class Block:
    """The weights that one :func:`cached` keeps."""

    def __init__(self, model: nn.Module) -> None:
        self.excitations = {module for module in model.modules() if isinstance(module, Excitation)}
        self._kept: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}

    def excited(
        self, excitation: Excitation, raw: Tensor, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The excited weight, computed by the first call for these very tensors."""
        computed_from = (raw, *excitation.parameters())
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), excitation.training
        key = (excitation, modes, *map(id, computed_from))
        if key not in self._kept:
            # Keep the tensors too, or their ids could be reused.
            self._kept[key] = computed_from, compute(raw)
        return self._kept[key][1]


class _Here(threading.local):
    """The blocks this thread has entered, outermost first."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []


_here = _Here()


def block_of(excitation: Excitation, raw: Tensor) -> Block | None:
    """The entered block that caches this excitation's weight, if there is one."""
    if torch.compiler.is_compiling() or not _here.blocks or _must_compute(raw):
        return None
    return next((block for block in _here.blocks if excitation in block.excitations), None)


def _must_compute(raw: Tensor) -> bool:
    """Whether a mode, transform or tracer must see the computation."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (raw.is_cuda and torch.cuda.is_current_stream_capturing())
    )
