"""Scaled weight standardization: standardized filters that keep the scale of their input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import check_positive, spread
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.standardize import deviation_and_mean, standardized

_EPSILON = 1e-5


class ScaledStandardize(Excitation):
    """``gamma g_j (W_j - mean_j) / sqrt(N var_j)`` for each filter j of N weights.

    Brock et al. (arXiv 2101.08692, "Scaled Weight Standardization"; NFNets, arXiv 2102.06171),
    with a trained g_j, the parameter ``gain``, ``[O]``, from 1. The variance is the biased one, so
    each filter has the length ``gamma g_j``, and the layer needs no norm after it. 1e-5 is added to
    each deviation, and a constant filter becomes 0; the authors' code bounds ``N var_j`` from below
    by 1e-4. A filter of a single weight is only multiplied by g_j.

    Args:
        gamma: the positive constant of the activation that follows; ``sqrt(2 / (1 - 1 / pi))``,
            about 1.7128, for ReLU. With 1 the network's activations must apply it, as in timm.
    """

    name: ClassVar[str] = "scaled_standardize"
    order: ClassVar[int] = 0
    summary: ClassVar[str] = "each filter with mean 0 and a trained length"
    source: ClassVar[str] = "Brock et al., NFNets (arXiv 2101.08692 and 2102.06171)"
    gamma: float = 1.0

    def __init__(
        self,
        out_channels: int,
        gamma: float = 1.0,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.gamma = check_positive(f"{self.name}: gamma", gamma)
        self.gain = nn.Parameter(torch.ones(out_channels, device=device, dtype=dtype))

    def excite(self, weight: Tensor) -> Tensor:
        fan_in = weight[0].numel()
        # N var = (N - 1) std^2, std being the unbiased deviation.
        scale = self.gamma / math.sqrt(fan_in - 1) if fan_in > 1 else 1.0
        return standardized(weight, _EPSILON) * spread(self.gain.to(weight.dtype) * scale, weight)

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        self.gain.fill_(1)
        fan_in = weight[0].numel()
        if fan_in < 2:
            ones = weight.new_ones(weight.shape[0])
            return Affine(ones, torch.zeros_like(ones))
        deviation, mean = deviation_and_mean(weight)
        return Affine((deviation + _EPSILON) * math.sqrt(fan_in - 1) / self.gamma, mean)

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return (layout.out_channels,)

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return (len(state["gain"]),)
