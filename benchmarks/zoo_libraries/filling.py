"""Calling what takes many arguments with small values, by the names of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from zoo_models import Candidate, seeded


def fill(maker: Callable[..., Any], values: Mapping[str, Any], **own: Any) -> Any:
    """``maker`` called with those of the values that it has an argument for, and with ``own``."""
    asked = signature(maker).parameters
    return maker(**{key: value for key, value in values.items() if key in asked} | own)


def fitting(forward: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a forward has an argument for, without the optional ones it can do without.

    Raises:
        KeyError: it asks for something that is not there.
    """
    asked = signature(forward).parameters.values()
    needed = [p.name for p in asked if p.default is Parameter.empty and p.kind < 2]
    return {name: values[name] for name in needed}


def noise(*shape: int) -> Tensor:
    """The same normal numbers each time."""
    return torch.randn(shape, generator=seeded())


def whole(high: int, *shape: int) -> Tensor:
    """The same whole numbers under ``high`` each time."""
    return torch.randint(high, shape, generator=seeded())


def on(*inputs: Any, chooses: bool = False) -> Candidate:
    """These positional arguments."""
    shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
    return Candidate(inputs, shapes[0] if shapes else (), chooses=chooses)


def by_name(**inputs: Any) -> Candidate:
    """These keyword arguments."""
    shapes = [tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor)]
    return Candidate(inputs, shapes[0] if shapes else ())
