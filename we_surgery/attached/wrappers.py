"""Wrappers of models and optimizers, and how to unwrap them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

_MODEL_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_original_module",
}

PURE_WRAPPERS = {
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "optimizer",
    "OptimWrapper": "optimizer",  # mmengine
    "AmpOptimWrapper": "optimizer",
    "ApexOptimWrapper": "optimizer",
}
"""Classes that pass each step on to the optimizer in that attribute."""
_PREFIXES = ("Lightning", "Fabric")
"""Of the names of classes that Lightning makes, which do so too."""

_INNER = ("optimizer", "_base_optimizer", "base_optimizer")
"""Where optimizers that do something of their own around a step keep the one they wrap."""

SWITCHES = ("train", "eval", "sync_lookahead")
"""Methods of optimizers that change weights outside of a step: schedule-free and Lookahead."""
STEPS = {"first_step": False, "second_step": True}
"""The two halves of a step of SAM, and whether training has moved on after it."""


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that steps, inside wrappers that only pass its step on."""
    while (name := type(optimizer).__name__).startswith(_PREFIXES) or name in PURE_WRAPPERS:
        attribute = PURE_WRAPPERS.get(name, "optimizer")
        inner = getattr(optimizer, attribute, None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


def with_wrapped(optimizer: Any) -> Iterator[Any]:
    """The optimizer and those it wraps, as timm's Lookahead and SAM do."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        attributes = vars(optimizer)
        found = (attributes.get(name) for name in _INNER)
        optimizer = next((inner for inner in found if isinstance(inner, Optimizer)), None)


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model inside DDP, ``DataParallel`` and ``torch.compile``; the Parameters are the same."""
    while (attribute := _MODEL_WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model
