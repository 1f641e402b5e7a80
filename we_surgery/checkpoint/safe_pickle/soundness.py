"""Checks that unpickled objects are as their classes would build them.

A pickle sets a module's attributes without its class. It could replace a method by another
callable, add hooks, or name a submodule with code for tools that generate programs from names.
Pickles of torchvision and timm models do none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.converted.excite import is_traced_whole
from we_surgery.errors import InputError

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
# Torch keeps these beside a tensor's attributes, and pickles set them as they set attributes.
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")

# Under a method's name they are an error where the method is called, and nothing else.
_PLAIN = (str, int, float, bool, type(None))

# An expanded tensor is small in a file and as large as it says once something computes with it.
_MOST_REPEATED = 1 << 24

# A file can name these and not make or change them: what hangs on them is their own.
_NOT_MADE = (type, Enum, FunctionType)


def refuse_unsound(found: Any, path: Path) -> None:
    """Raises if a file's object could change what torch's or our code does.

    A module must not hide a method, have a hook, contain itself, be uninitialized or have an
    unusual name. A tensor must not hide a method, have a hook, or claim a size far beyond its
    memory. Other objects must not hide a method or have a name that Python looks up. No method of
    any object is called.
    """
    fault = _fault(found)
    if fault is not None:
        raise InputError(
            f"{path} is damaged or doctored: {fault}",
            "Save or fetch it again. Only if you trust where the file is from: --trust "
            "(`trust=True`) opens it as it is.",
        )


def _fault(found: Any) -> str | None:
    modules: list[nn.Module] = []
    for value in everything_in(found):
        fault: str | None = None
        if isinstance(value, nn.Module):
            modules.append(value)
            fault = _fault_in_module(value)
        elif isinstance(value, Tensor):
            fault = _fault_in_tensor(value)
        elif not isinstance(value, _NOT_MADE):
            fault = _fault_in_attributes(value)
        if fault is not None:
            return fault
    return _cycle(modules)


def everything_in(*found: Any) -> Iterator[Any]:
    """The objects and all that they hold, each once, and before what it holds."""
    seen: set[int] = set()
    pending = [*found]
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            pending.extend(_held_by(value))


def _held_by(value: Any) -> Iterator[Any]:
    """What an object holds, found without calling a method that a file may have put there."""
    if isinstance(value, dict):
        yield from dict.keys(value)
        yield from dict.values(value)
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.args, value.keywords)
    elif isinstance(value, Tensor) and value.is_leaf:
        yield value.grad
    if not isinstance(value, type):
        yield getattr(value, "__dict__", None)


def _hides_method(kind: type, name: str, value: Any) -> bool:
    """Whether an object's own attribute would be called instead of its class's method."""
    if type(value) in _PLAIN:
        return False
    # Some of nn.Module's own are None until torch puts a callable there.
    is_torchs = issubclass(kind, nn.Module) and name in vars(nn.Module)
    return is_torchs or callable(getattr(kind, name, None))


def _holds_hooks(value: Any) -> bool:
    """Whether an attribute for hooks is not empty; it may be any object."""
    is_empty = isinstance(value, dict) and not dict.__len__(value)
    return not (is_empty or value is None or type(value) is bool)


def _fault_in_module(module: nn.Module) -> str | None:
    kind = type(module)
    attributes = vars(module)
    named = [*attributes.items()]
    for table, allowed in zip(_TABLES, (Tensor, Tensor, nn.Module), strict=True):
        entries = attributes.get(table)
        if not isinstance(entries, dict):
            return f"a {kind.__name__} was never initialized"
        for name, value in dict.items(entries):
            if value is not None and not isinstance(value, allowed):
                return f"{_shortened(name)} of a {kind.__name__} is of type {type(value).__name__}"
            named.append((name, value))
    for name, value in named:
        if name == "__module__" and is_traced_whole(attributes):
            continue
        if not _is_plain_name(name):
            return f"a {kind.__name__} has an attribute called {_shortened(name)}"
        if _hides_method(kind, name, value):
            return f"{name!r} of a {kind.__name__} hides the method of that name"
    hooks = [name for name in _HOOKS if _holds_hooks(attributes.get(name))]
    if hooks:
        return f"a {kind.__name__} has {hooks[0]}, which would run when it is used"
    return None


def _fault_in_attributes(value: Any) -> str | None:
    """Of a record, a partial, an OrderedDict: what copies and writes them looks names up there."""
    kind = type(value)
    attributes = getattr(value, "__dict__", None)
    for name, held in attributes.items() if isinstance(attributes, dict) else ():
        if not isinstance(name, str) or (name.startswith("__") and name.endswith("__")):
            return f"a {kind.__name__} has an attribute called {_shortened(name)}"
        if _hides_method(kind, name, held):
            return f"{name!r} of a {kind.__name__} hides the method of that name"
    return None


def _is_plain_name(name: Any) -> bool:
    """Whether the name is printable, not special (``__x__``) and safe in generated code."""
    if not isinstance(name, str) or not name.isprintable() or not name:
        return False
    is_special = name.startswith("__") and name.endswith("__")
    return not is_special and not any(character in name for character in "\"'\\")


def _cycle(modules: list[nn.Module]) -> str | None:
    """Whether one contains itself; walking it would never end."""
    above: set[int] = set()
    done: set[int] = set()
    # Each module is entered once, and left after all below it.
    pending = [(module, False) for module in modules]
    while pending:
        module, leaves = pending.pop()
        if leaves:
            above.discard(id(module))
            done.add(id(module))
        elif id(module) in above:
            return f"a {type(module).__name__} contains itself"
        elif id(module) not in done:
            above.add(id(module))
            below = dict.values(vars(module)["_modules"])
            pending.append((module, True))
            pending.extend((child, False) for child in below if child is not None)
    return None


def _fault_in_tensor(tensor: Tensor) -> str | None:
    for name, value in vars(tensor).items():
        if not _is_plain_name(name):
            return f"a tensor has an attribute called {_shortened(name)}"
        if hasattr(Tensor, name) and type(value) not in _PLAIN:
            return f"{name!r} of a tensor hides the attribute of that name"
    if any(_holds_hooks(getattr(tensor, name)) for name in _TENSOR_HOOKS):
        return "a tensor has hooks, which would run in a backward pass"
    if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized:
        values = tensor.numel()
        held = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
        if values > _MOST_REPEATED and values > 1000 * held:
            return f"a tensor of {tuple(tensor.shape)} repeats the {held} values it holds"
    return None


def _shortened(name: Any) -> str:
    return repr(name)[:60] if isinstance(name, str) else f"a {type(name).__name__}"
