"""How well a weight fits into int8: its range, its outliers, and the error of rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Error:
    """What int8 would do to one weight.

    Attributes:
        peak: the largest absolute value over the root mean square of all.
        per_tensor: the error with one scale for the weight; see :func:`channel_errors`.
        per_channel: the error with one scale for each output channel.
    """

    peak: float
    per_tensor: float
    per_channel: float


def int8_error(weight: Tensor) -> Int8Error:
    """Measures a weight ``[O, ...]``, as its layer stores it."""
    values = weight.detach().float()
    errors = [
        channel_errors(values, round_weight(values, per_channel=per_channel))
        for per_channel in (False, True)
    ]
    rms = values.square().mean().sqrt().item()
    return Int8Error(
        values.abs().max().item() / rms if rms else 0.0,
        *(error.square().mean().sqrt().item() if len(error) else 0.0 for error in errors),
    )


def round_weight(weight: Tensor, bits: int = 8, *, per_channel: bool = False) -> Tensor:
    """A weight ``[O, ...]`` rounded to symmetric integers, and scaled back."""
    largest = 2 ** (bits - 1) - 1
    axes = tuple(range(1, weight.ndim)) if per_channel else None
    peaks = weight.abs().amax(axes, keepdim=True) if per_channel else weight.abs().max()
    scale = (peaks / largest).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round() * scale


def channel_errors(weight: Tensor, rounded: Tensor) -> Tensor:
    """The relative error of each output channel that is not zero.

    A norm behind the layer brings small channels to the size of large ones, with their error.
    """
    norms = weight.flatten(1).norm(dim=1)
    errors = (rounded - weight).flatten(1).norm(dim=1)
    return errors[norms > 0] / norms[norms > 0]
