"""The hooks of a copy, some of which are not to be called on a trial run.

A deep copy binds the methods of copied objects anew: such hooks are part of the model. It shares a
hook that is a function, and that one may keep what it is given.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NEVER_COPIED = (types.FunctionType, types.BuiltinFunctionType, type)


def drop_hooks(model: nn.Module, keep: Callable[[Any], bool] = lambda hook: False) -> None:
    """Removes the forward and backward hooks of a model.

    Args:
        model: a copy.
        keep: whether to keep a hook; asked of those of the forward alone.
    """
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    for hooks in _forward_hooks(model):
        for key, hook in list(hooks.items()):
            if not keep(hook):
                del hooks[key]


def has_shared_hooks(model: nn.Module) -> bool:
    """Whether a copy of the model would share hooks with it that can run in both."""
    return any(
        can_run_in_copy(hook) and not is_copied(hook)
        for hooks in _forward_hooks(model)
        for hook in hooks.values()
    )


def is_copied(hook: Any) -> bool:
    """Whether a deep copy of a model has this hook for itself, or torch itself has put it there."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if (getattr(hook, "__module__", None) or "").startswith("torch."):
        return True
    if isinstance(hook, types.MethodType):
        hook = hook.__self__
    return not isinstance(hook, _NEVER_COPIED)


def can_run_in_copy(hook: Any) -> bool:
    """Whether a hook is not known to work on the modules of the model that it was made for."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            if isinstance(cell.cell_contents, nn.Module):
                return False
        except ValueError:  # a variable that has no value yet
            continue
    return True


def _forward_hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks
