"""A torch.fx graph written down while a copy of the model runs once, without its weights.

The copy's parameters are fake tensors, so a forward takes no memory or arithmetic of the
model's size. A dispatch mode sees each aten operation below autograd, whatever Python code
called it: inlined subclasses, functional calls and fused attention included.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_iter

from we_surgery._util.copies import deep_copy
from we_surgery.reading.hooks import can_run_in_copy, drop_hooks, is_copied
from we_surgery.reading.recorder import Recorder
from we_surgery.reading.replay import Origin
from we_surgery.reading.running import call, copied, fixed_seed, with_tensors
from we_surgery.reading.stand_ins import Fakes


@dataclass
class Recording:
    """One forward of a model as a graph of aten operations.

    Attributes:
        graph: placeholders for inputs, ``get_attr`` for parameters and buffers by their
            qualified names (``constant_N`` for any other tensor), ``call_function`` for
            operations. Each node's meta tells the module that ran it and the shape.
        training: whether the model was in train mode.
        calls: how often each module was called.
        constants: the values of ``constant_N`` nodes, tensors that are neither parameters
            nor buffers nor made in the forward.
    """

    graph: fx.Graph
    training: bool
    calls: Counter[str] = field(default_factory=Counter)
    constants: dict[str, Tensor] = field(default_factory=dict)


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    fakes: Fakes | None = None,
    shared_hooks: bool = False,
) -> Recording:
    """Records one forward of a copy of ``model``, which is not changed.

    Args:
        model: any model in eager mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping.
        training: record in train mode, with gradients; otherwise in eval mode without.
        fakes: where stand-ins come from. Without it real tensors are used, for models whose
            control flow or shapes depend on data. That takes the memory of a copy of ``model``,
            whose forward may write to its weights.
        shared_hooks: run those forward hooks, too, that the copy shares with ``model``: functions,
            which may keep or change what is the user's.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    origin = Origin(model, example_inputs)
    with _unlogged(), uncollected(), torch.set_grad_enabled(training):
        replica = _replica(model, fakes, shared_hooks)
        replica.train(training)  # which a model may override and return nothing from
        return _record(replica, origin, fakes)


def _record(replica: nn.Module, origin: Origin, fakes: Fakes | None) -> Recording:
    inputs = with_tensors(origin.example_inputs, copied if fakes is None else fakes)
    recorder = Recorder(replica)
    for tensor in tree_iter(inputs):
        if isinstance(tensor, Tensor):
            recorder.add_input(tensor)
    if fakes is not None:
        fakes.watch(recorder, origin)
    active = contextlib.nullcontext() if fakes is None else fakes.mode
    with fixed_seed(origin.model), recorder.watching(replica), active, recorder:
        outputs = call(replica, inputs)
    recorder.finish(replica, outputs)
    return Recording(
        recorder.graph,
        replica.training,
        recorder.calls,
        recorder.constants,
    )


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector from walking a graph again and again while it grows."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps torch from logging an operation that fails on fake tensors, as some are to fail."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _replica(model: nn.Module, fakes: Fakes | None, shared_hooks: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if fakes is None and isinstance(parameter, UninitializedParameter):
            continue
        if fakes is not None:
            memo[id(parameter)] = fakes.parameter(parameter)
            continue
        # A deep copy of a sparse Parameter fails.
        own = parameter.detach().clone()
        memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    if fakes is not None:
        for buffer in model.buffers():
            memo[id(buffer)] = fakes(buffer)
    for module in model.modules():
        # A module has a dozen hook dictionaries, mostly empty; copying those is half of the work.
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()
    replica = deep_copy(model, memo)
    drop_hooks(replica, can_run_in_copy if shared_hooks else is_copied)
    return replica
