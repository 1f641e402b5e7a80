"""Restores class attributes and globals after a trial run of a model."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_DEPTH = 2
"""How deep containers lie in each other: a cache of caches is one inside another."""
_NOT_A_MODELS = frozenset(["torch", "builtins", "typing", "abc", "we_surgery"])


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Restores class attributes and globals that a model's code may fill.

    A traced forward, or one on made-up inputs, would leave unusable values in caches.
    """
    classes = _classes_of(model)
    globals_ = _globals_of(classes)
    functions = [f for own in globals_ for f in own.values() if isinstance(f, FunctionType)]
    attributes = [(kind, dict(vars(kind))) for kind in classes]
    names = [(own, dict(own)) for own in [*globals_, *(f.__dict__ for f in functions)]]
    values = [value for _, own in [*attributes, *names] for value in own.values()]
    containers = [(value, value.copy()) for value in _containers(values)]
    try:
        yield
    finally:
        for kind, kept in attributes:
            for name, value in _changes(vars(kind), kept):
                type.__setattr__(kind, name, value)
            for name in _additions(vars(kind), kept):
                type.__delattr__(kind, name)
        for own, kept in names:
            own.update(_changes(own, kept))
            for name in _additions(own, kept):
                del own[name]
        for found, copied in containers:
            if not _is_same(found, copied):
                found.clear()
                (found.extend if isinstance(found, list) else found.update)(copied)


def _classes_of(model: nn.Module) -> list[type]:
    kinds = {type(module) for module in model.modules()}
    bases = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    return [base for base in bases if _is_a_models(base.__module__)]


def _globals_of(classes: Iterable[type]) -> list[dict[str, Any]]:
    """The globals of the files that define the classes, and of the functions imported there."""
    modules = {name: sys.modules.get(name) for name in {kind.__module__ for kind in classes}}
    found = {id(vars(module)): vars(module) for module in modules.values() if module is not None}
    for own in list(found.values()):
        for value in list(own.values()):
            if isinstance(value, FunctionType) and _is_a_models(value.__module__):
                found[id(value.__globals__)] = value.__globals__
    return list(found.values())


def _is_a_models(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] not in _NOT_A_MODELS


def _containers(values: Iterable[Any], depth: int = _DEPTH) -> Iterator[Any]:
    for value in values:
        if type(value) in _CONTAINERS:
            yield value
            if depth > 1 and type(value) is not set:
                inner = value if isinstance(value, list) else value.values()
                yield from _containers(list(inner), depth - 1)


def _changes(now: Any, kept: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in kept.items() if _is_plain(k) and now.get(k, kept) is not v]


def _additions(now: Any, kept: dict[str, Any]) -> list[str]:
    return [name for name in now if _is_plain(name) and name not in kept]


def _is_plain(name: Any) -> bool:
    """Whether Python itself does not set the name, as it does ``__annotations__``."""
    return not str(name).startswith("__")


def _is_same(found: Any, copied: Any) -> bool:
    if len(found) != len(copied):
        return False
    if isinstance(found, set):
        return bool(found == copied)
    if isinstance(found, dict):
        return all(copied.get(key, copied) is value for key, value in found.items())
    return all(one is other for one, other in zip(found, copied, strict=True))
