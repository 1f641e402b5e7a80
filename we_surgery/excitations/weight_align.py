"""WeightAlign: filters of mean 0 and the scale that He initialization gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import spread
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.standardize import deviation_and_mean, standardized

_EPSILON = 1e-5


class WeightAlign(Excitation):
    """``g_j * (W_j - mean_j) / sqrt(N / 2 * var_j)`` for each filter j of N weights.

    Shi et al. (arXiv 2010.07160), with a trained g_j that starts at 1. Each filter has the
    length ``sqrt(2) g_j``, which is weight standardization at the scale of He initialization: it
    needs no norm after the layer. **Not verified**: we had the paper's abstract ("mean and
    scaled standard derivation computed within a filter") and no code of its authors; the factor
    1/2, the biased variance and the start of g are reconstructed. To each deviation 1e-5 is
    added, so a constant filter becomes 0; a filter of a single weight is only multiplied by g_j.

    Args:
        out_channels: O, the layer's filters.
        device, dtype: those of the layer.

    The parameter is ``gain``, g, ``[O]``.
    """

    name: ClassVar[str] = "weight_align"
    order: ClassVar[int] = 0
    summary: ClassVar[str] = "each filter with mean 0 and the scale of He initialization"
    source: ClassVar[str] = "Shi et al., WeightAlign (formula reconstructed from the abstract)"

    def __init__(self, out_channels: int, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(out_channels, device=device, dtype=dtype))

    def excite(self, weight: Tensor) -> Tensor:
        aligned = standardized(weight, _EPSILON)
        fan_in = weight[0].numel()
        # N var = (N - 1) std^2, std being the unbiased deviation.
        scale = math.sqrt(2 / (fan_in - 1)) if fan_in > 1 else 1.0
        return aligned * spread(self.gain.to(weight.dtype) * scale, weight)

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        self.gain.fill_(1)
        fan_in = weight[0].numel()
        if fan_in < 2:
            ones = weight.new_ones(weight.shape[0])
            return Affine(ones, torch.zeros_like(ones))
        deviation, mean = deviation_and_mean(weight)
        return Affine((deviation + _EPSILON) * math.sqrt((fan_in - 1) / 2), mean)

    @classmethod
    def for_layout(cls, layout: WeightLayout, *, device: Device, dtype: DType) -> Self:
        return cls(layout.out_channels, device=device, dtype=dtype)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        gain = state["gain"]
        return cls(gain.shape[0], device="meta", dtype=gain.dtype)
