"""What several excitations share."""

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
"""By their names in options; ``leaky_relu`` has torch's default slope of 0.01."""


def check_choice(where: str, value: object, choices: Collection[str]) -> str:
    """``value``; a ``ValueError`` if it is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
    return value


def check_flag(where: str, value: object) -> bool:
    """``value``; a ``ValueError`` if it is not true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {value!r}")
    return value


def check_mapping(where: str, value: object) -> Mapping[str, Any]:
    """``value``; a ``ValueError`` if it is not a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of options, not {value!r}")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive(where: str, value: object) -> float:
    """``value``; a ``ValueError`` if it is not a positive finite number."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{where} must be positive and finite, not {value!r}")
    return float(value)


def check_count(where: str, value: object, least: int = 1) -> int:
    """``value``; a ``ValueError`` if it is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} must be an integer of at least {least}, not {value!r}")
    return value


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``inputs W^T + b`` in the inputs' dtype; parameters may be half precision."""
    return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))


def kernel_mean(weight: Tensor) -> Tensor:
    """``[O, I]`` of ``[O, I, *K]``."""
    return weight.mean(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight


def spread(values: Tensor, like: Tensor) -> Tensor:
    """``[O]`` or ``[O, I]`` reshaped to broadcast over ``[O, I, *K]``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


@torch.no_grad()
def make_constant(layer: Any, value: float) -> None:
    """Makes a linear or conv layer output ``value`` for every input."""
    layer.weight.zero_()
    layer.bias.fill_(value)


@torch.no_grad()
def wake_units(layer: nn.Linear, inputs: Tensor) -> None:
    """Mirrors units that a ReLU turns off for all ``inputs`` ``[N, I]``, and that cannot learn."""
    off = (linear(inputs, layer.weight, layer.bias) <= 0).all(0)
    sign = torch.where(off, -1.0, 1.0).to(layer.weight.dtype)
    layer.weight.mul_(sign.unsqueeze(1))
    layer.bias.mul_(sign)
