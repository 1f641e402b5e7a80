"""Runs a copy of a model on example inputs, and decides which of its hooks run.

Hooks that are methods of copied objects are bound to the copies, and part of the model. Hooks that
are functions are shared with the original, and may keep their arguments.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from we_surgery._util.copies import drawing_nothing, gpus_of

_NEVER_COPIED = (types.FunctionType, types.BuiltinFunctionType, type)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Calls ``model`` on a tensor, on positional arguments, or on a mapping of keyword ones."""
    # Calling a graph module prints its code when it fails.
    run = (
        functools.partial(nn.Module.__call__, model) if isinstance(model, fx.GraphModule) else model
    )
    if isinstance(example_inputs, Mapping):
        return run(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return run(*example_inputs)
    return run(example_inputs)


def with_tensors(example_inputs: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The example inputs with each tensor in them replaced."""
    if isinstance(example_inputs, Mapping):  # some that torch does not know for one, too
        example_inputs = dict(example_inputs)
    return tree_map_only(Tensor, replace, example_inputs)


def copied(tensor: Tensor) -> Tensor:
    """A copy for a forward pass to write to."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def fixed_seed(model: nn.Module) -> Iterator[None]:
    """Seeds torch on the CPU and the model's own GPUs; all generators get their state back."""
    with drawing_nothing(model):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[index] for index in gpus_of(model)),
        ):
            generator.manual_seed(0)
        yield


def drop_hooks(model: nn.Module, keep: Callable[[Any], bool] = lambda hook: False) -> None:
    """Removes the hooks of a copied model but those of the forward that are to be kept."""
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
