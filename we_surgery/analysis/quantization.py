"""How well a weight fits into int8: its range, its outliers, and the error of rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LARGE_ERROR = 0.05
"""The error from which on a layer costs accuracy: `python benchmarks/quantization.py report`."""


@dataclass(frozen=True)
class Int8Error:
    """The int8 error of one weight, by its vanilla key.

    Attributes:
        peak: the largest absolute value over the root mean square.
        per_tensor: the error with one scale for the weight; see :func:`channel_errors`.
        per_channel: the error with one scale per output channel.
    """

    name: str
    low: float
    high: float
    peak: float
    per_tensor: float
    per_channel: float

    @property
    def advice(self) -> str:
        """What to do, or "" where int8 fits."""
        if self.per_channel > LARGE_ERROR:
            return "keep in float"
        return "scale per channel" if self.per_tensor > LARGE_ERROR else ""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {**asdict(self), "advice": self.advice}


def int8_error(name: str, filters: Tensor) -> Int8Error:
    """Measures a weight ``[O, ...]``, output channels first."""
    values = filters.detach().float()
    errors = [
        channel_errors(values, round_weight(values, per_channel=per_channel))
        for per_channel in (False, True)
    ]
    rms = values.square().mean().sqrt().item()
    low, high = values.min().item(), values.max().item()
    return Int8Error(
        name,
        low,
        high,
        max(-low, high) / rms if rms else 0.0,
        *(error.square().mean().sqrt().item() if len(error) else 0.0 for error in errors),
    )


def round_weight(weight: Tensor, bits: int = 8, *, per_channel: bool = False) -> Tensor:
    """A weight ``[O, ...]`` rounded to symmetric integers, and scaled back."""
    largest = 2 ** (bits - 1) - 1
    peaks = weight.abs().flatten(1).amax(1) if per_channel else weight.abs().max()
    scale = (peaks / largest).clamp(min=torch.finfo(weight.dtype).tiny)
    scale = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    rounded: Tensor = (weight / scale).round() * scale
    return rounded


def channel_errors(weight: Tensor, rounded: Tensor) -> Tensor:
    """The relative error of each output channel that is not zero.

    Relative, because a norm after the layer scales small channels up, with their error.
    """
    norms = weight.flatten(1).norm(dim=1)
    errors = (rounded - weight).flatten(1).norm(dim=1)
    ratios: Tensor = errors[norms > 0] / norms[norms > 0]
    return ratios


def int8_summary(errors: Iterable[Int8Error]) -> str:
    """In a sentence, which layers quantize badly and what to do."""
    errors = list(errors)
    if not errors:
        return "int8: no float weights to measure"
    said = []
    for advice, what in _WHAT_TO_DO.items():
        names = [error.name for error in errors if error.advice == advice]
        if names:
            said.append(f"{len(names)} of {len(errors)} weights {what}: {', '.join(names)}")
    if said:
        return f"int8: {'; '.join(said)}"
    worst = max(errors, key=lambda error: error.per_tensor)
    return (
        f"int8: all {len(errors)} weights fit, with errors of at most {worst.per_tensor:.1%} "
        f"with one scale per tensor ({worst.name})"
    )


_WHAT_TO_DO = {
    "scale per channel": f"lose over {LARGE_ERROR:.0%} with one scale per tensor; quantize them "
    "with one scale per output channel",
    "keep in float": f"lose over {LARGE_ERROR:.0%} even with one scale per output channel; keep "
    "them in float, or train quantization-aware",
}
