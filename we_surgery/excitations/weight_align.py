"""WeightAlign: filters with mean 0 and the scale of He initialization."""

from __future__ import annotations

import math
from typing import ClassVar

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.scaled_standardize import ScaledStandardize


class WeightAlign(ScaledStandardize):
    """``g_j * (W_j - mean_j) / sqrt(N / 2 * var_j)`` for each filter j of N weights.

    Shi et al. (arXiv 2010.07160): scaled standardization with a gamma of ``sqrt(2)``, the scale of
    He initialization, and a trained g_j, the parameter ``gain``, from 1. **Not verified**: we had
    only the paper's abstract ("mean and scaled standard derivation computed within a filter"); the
    factor 1/2, the biased variance and the start of g are reconstructed.
    """

    name: ClassVar[str] = "weight_align"
    summary: ClassVar[str] = "each filter with mean 0 and the scale of He initialization"
    source: ClassVar[str] = "Shi et al., WeightAlign (formula reconstructed from the abstract)"
    gamma: float = math.sqrt(2)

    def __init__(self, out_channels: int, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__(out_channels, math.sqrt(2), device=device, dtype=dtype)
