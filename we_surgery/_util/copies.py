"""Copies of models, whole or sharing their tensors."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from we_surgery._util.scripted import is_scripted
from we_surgery.errors import SurgeryError

_SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))
"""Attributes that Python cannot copy and that a copy may share."""
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_VIEWS: dict[type, str] = {
    type(getattr(mapping, method)()): method
    for mapping in (dict[str, Any](), OrderedDict[str, Any]())
    for method in ("keys", "values", "items")
}
"""The method that makes each sort of view of a dictionary."""


def copy_model(model: nn.Module, *, share_tensors: bool = False) -> nn.Module:
    """A deep copy."""
    try:
        # Parameters that are made in inference mode cannot be trained.
        with torch.inference_mode(False):
            shared = [*model.parameters(), *model.buffers()] if share_tensors else []
            memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
            copied = deep_copy(model, memo)
            _complete_graph_modules(model, memo)
            return copied
    except Exception as error:
        raise SurgeryError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            "Pass `inplace=True`, and no `example_inputs`, which are run on a copy."
            if not share_tensors
            else "Convert without transplants, which are planned on a copy of the modules.",
        ) from error


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy``, also for models with attributes that it refuses.

    Results of a forward pass are copied without their graph, views of dictionaries become views
    of the copies, and locks and Python modules are shared.
    """
    with _Results():
        modules = (module for module in model.modules() if not is_scripted(module))
        _prepare([value for module in modules for value in vars(module).values()], memo)
        return copy.deepcopy(model, memo)


class _Results(TorchFunctionMode):
    """Copies tensors without their graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _prepare(values: list[Any], memo: dict[int, Any]) -> None:
    """Fills the memo with copies of what Python cannot copy, in attributes and containers."""
    seen: set[int] = set()
    while values:
        value = values.pop()
        if id(value) in seen or id(value) in memo:
            continue
        seen.add(id(value))
        kind = type(value)
        if kind in (list, tuple, set):
            values += value
        elif kind is dict:
            values += value.values()
        elif isinstance(value, _SHARED):
            memo[id(value)] = value
        elif kind in _VIEWS:
            (viewed,) = gc.get_referents(value)
            memo[id(value)] = getattr(copy.deepcopy(viewed, memo), _VIEWS[kind])()


def _complete_graph_modules(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Completes copies of GraphModules.

    torch's deep copy drops attributes, such as the plan, and names of tied parameters that the
    graph does not read.
    """
    graphs = (module for module in model.modules() if isinstance(module, fx.GraphModule))
    for module in graphs:
        everything = memo.get(id(module.__dict__))
        if everything is not None:  # a subclass may copy itself differently
            copied = memo[id(module)].__dict__
            copied.update({name: everything[name] for name in _STATE})
            for name, value in everything.items():
                copied.setdefault(name, value)


@contextlib.contextmanager
def drawing_nothing(model: nn.Module) -> Iterator[None]:
    """Restores the random states of torch (CPU and the model's GPUs), Python and NumPy."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=gpus_of(model)):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def gpus_of(model: nn.Module) -> list[int]:
    """The numbers of the GPUs that hold the model's parameters."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
