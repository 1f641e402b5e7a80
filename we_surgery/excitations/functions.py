"""Small functions that several excitations share."""

from __future__ import annotations

from collections.abc import Callable, Collection
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

_CONVS: tuple[Callable[..., nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def check_choice(where: str, value: object, choices: Collection[str]) -> str:
    """``value`` if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_flag(where: str, value: object) -> bool:
    """``value`` if it is true or false.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {value!r}")
    return value


def make_conv(
    inputs: int,
    outputs: int,
    kernel_size: tuple[int, ...],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A conv of the kernel's rank with bias, in torch's default initialization."""
    sizes = (inputs, outputs, kernel_size) if kernel_size else (inputs, outputs)
    return _CONVS[len(kernel_size)](*sizes, device=device, dtype=dtype)


def same_conv(inputs: Tensor, conv: nn.Module) -> Tensor:
    """The conv on maps ``[N, C, *size]``, zero-padded so that their size stays.

    An odd kernel is padded by half its size on both sides, an even one by one more behind.
    """
    # Not get_parameter: a backward pass may put other tensors in the parameters' place.
    own: Any = conv
    weight, bias = (tensor.to(inputs.dtype) for tensor in (own.weight, own.bias))
    kernel = weight.shape[2:]
    padding = [side for k in reversed(kernel) for side in ((k - 1) // 2, k // 2)]
    return _FUNCTIONS[len(kernel)](F.pad(inputs, padding) if padding else inputs, weight, bias)


def batch_standardized(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of ``[N, C, *]`` by the batch's own statistics, also in eval mode.

    ``weight`` and ``bias`` are ``[C]``; 1e-5 is added to the variance.
    """
    dims = (0, *range(2, inputs.ndim))
    variance, mean = torch.var_mean(inputs, dims, correction=0, keepdim=True)
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    normed = (inputs - mean) * torch.rsqrt(variance + 1e-5)
    return normed * weight.to(inputs.dtype).view(shape) + bias.to(inputs.dtype).view(shape)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``inputs W^T + b`` in the inputs' precision: parameters may be half, arithmetic never is."""
    return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))


def kernel_mean(weight: Tensor) -> Tensor:
    """``[O, I]`` of ``[O, I, *K]``."""
    return weight.mean(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight


def spread(values: Tensor, like: Tensor) -> Tensor:
    """``[O]`` or ``[O, I]`` made to broadcast over ``[O, I, *K]``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
