"""Small functions that several excitations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda x: x,
}
"""By the names that options use; the slope of ``leaky_relu`` is torch's default of 0.01."""


def check_choice(where: str, value: object, choices: Collection[str]) -> str:
    """``value`` if it is one of the choices; else it raises a ``ValueError``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
    return value


def check_flag(where: str, value: object) -> bool:
    """``value`` if it is true or false; else it raises a ``ValueError``."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {value!r}")
    return value


def check_mapping(where: str, value: object) -> Mapping[str, Any]:
    """``value`` if it is a mapping; else it raises a ``ValueError``."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of options, not {value!r}")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive(where: str, value: object) -> float:
    """``value`` if it is a positive finite number; else it raises a ``ValueError``."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{where} must be positive and finite, not {value!r}")
    return float(value)


def check_count(where: str, value: object, least: int = 1) -> int:
    """``value`` if it is an integer from ``least`` on; else it raises a ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} must be an integer of at least {least}, not {value!r}")
    return value


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``inputs W^T + b`` in the inputs' precision: parameters may be half, arithmetic never is."""
    return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))


def kernel_mean(weight: Tensor) -> Tensor:
    """``[O, I]`` of ``[O, I, *K]``."""
    return weight.mean(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight


def spread(values: Tensor, like: Tensor) -> Tensor:
    """``[O]`` or ``[O, I]`` made to broadcast over ``[O, I, *K]``; what has a kernel stays."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


@torch.no_grad()
def make_constant(layer: Any, value: float) -> None:
    """Makes a linear or conv layer give ``value`` for every input."""
    layer.weight.zero_()
    layer.bias.fill_(value)


@torch.no_grad()
def wake_units(layer: nn.Linear, inputs: Tensor) -> None:
    """Mirrors the units that a ReLU turns off for all ``inputs`` ``[N, I]``: they never learn."""
    off = (linear(inputs, layer.weight, layer.bias) <= 0).all(0)
    sign = torch.where(off, -1.0, 1.0).to(layer.weight.dtype)
    layer.weight.mul_(sign.unsqueeze(1))
    layer.bias.mul_(sign)
