"""The recorded reading: a torch.fx graph of one forward pass of a copy of the model.

The copy's parameters are fake tensors, so memory and arithmetic do not grow with the model. A
dispatch mode sees each aten operation below autograd, whatever Python code calls it: inlined
subclasses, functional calls and fused attention included.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_iter

from we_surgery._util.copies import deep_copy
from we_surgery.reading.fakes import Fakes, Replay
from we_surgery.reading.graph import ModelGraph
from we_surgery.reading.recorder import Recorder
from we_surgery.reading.running import (
    call,
    can_run_in_copy,
    copied,
    drop_hooks,
    fixed_seed,
    has_shared_hooks,
    is_copied,
    with_tensors,
)

logger = logging.getLogger(__name__)


def record_both_modes(model: nn.Module, example_inputs: Any) -> tuple[list[ModelGraph], list[str]]:
    """Recordings in eval and train mode (auxiliary heads run in one alone), and what went wrong.

    On fake tensors, or if those fail on real ones. If both fail, again with the hooks that a copy
    shares with the model: some models need them, but others only log, which a recording should not
    repeat. The list is empty if the model runs in neither mode.
    """
    recordings, notes = [], []
    with uncollected(), Fakes() as fakes:
        attempts: list[tuple[Fakes | None, bool]] = [(fakes, False), (None, False)]
        if has_shared_hooks(model):
            attempts += [(fakes, True), (None, True)]
        for training in (False, True):
            recording, attempts, failure = _record_by(attempts, model, example_inputs, training)
            if recording is not None:
                recordings.append(recording)
            else:
                notes.append(f"does not run in {_mode(training)} mode: {failure}")
    return recordings, notes


def _record_by(
    attempts: list[tuple[Fakes | None, bool]], model: nn.Module, example_inputs: Any, training: bool
) -> tuple[ModelGraph | None, list[tuple[Fakes | None, bool]], str]:
    """The first successful attempt, those worth trying in the other mode, and the last failure."""
    failure = ""
    for index, (fakes, shared_hooks) in enumerate(attempts):
        try:
            recording = record(
                model, example_inputs, training=training, fakes=fakes, shared_hooks=shared_hooks
            )
        except Exception as error:
            failure = first_line(error)
            kind = "real" if fakes is None else "fake"
            logger.info("not recorded on %s tensors in %s mode: %s", kind, _mode(training), failure)
        else:
            left = [attempt for attempt in attempts[index:] if attempt[1] == shared_hooks]
            return recording, left, ""
    return None, attempts, failure


def _mode(training: bool) -> str:
    return "train" if training else "eval"


def first_line(error: Exception) -> str:
    """The error's class and the first line of its message."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}"


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    fakes: Fakes | None = None,
    shared_hooks: bool = False,
) -> ModelGraph:
    """Records one forward pass of a copy of ``model``, which is not changed.

    Args:
        model: any model in eager mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping.
        training: record in train mode, with gradients; otherwise in eval mode without.
        fakes: makes the fake tensors. Without it, real ones are used, for models whose control
            flow or shapes depend on data; this needs memory for a copy of ``model``, because its
            forward may write to the weights.
        shared_hooks: also run the forward hooks that the copy shares with ``model``: functions,
            which may keep or change the user's objects.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    with _unlogged(), uncollected(), torch.set_grad_enabled(training):
        replica = _replica(model, fakes, shared_hooks)
        replica.train(training)  # which a model may override and return nothing from
        inputs = with_tensors(example_inputs, copied if fakes is None else fakes)
        recorder = Recorder(replica)
        for tensor in tree_iter(inputs):
            if isinstance(tensor, Tensor):
                recorder.add_input(tensor)
        if fakes is not None:
            fakes.watch(Replay(recorder, model, example_inputs))
        active = contextlib.nullcontext() if fakes is None else fakes.mode
        with fixed_seed(model), recorder.watching(replica), active, recorder:
            outputs = call(replica, inputs)
        recorder.finish(replica, outputs)
    return ModelGraph(
        recorder.graph,
        modules=dict(model.named_modules()),
        constants=recorder.constants,
        training=replica.training,
        calls=recorder.calls,
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
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, torchs.disabled = torchs.disabled, True
    try:
        yield
    finally:
        torchs.disabled = was_disabled


def _replica(model: nn.Module, fakes: Fakes | None, shared_hooks: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if fakes is not None:
            memo[id(parameter)] = fakes.parameter(parameter)
        elif not isinstance(parameter, UninitializedParameter):
            # A deep copy of a sparse Parameter fails.
            own = parameter.detach().clone()
            memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    if fakes is not None:
        for buffer in model.buffers():
            memo[id(buffer)] = fakes(buffer)
    for module in model.modules():
        # A module has a dozen hook dictionaries, mostly empty; copying them is half of the work.
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()
    replica = deep_copy(model, memo)
    drop_hooks(replica, can_run_in_copy if shared_hooks else is_copied)
    return replica
