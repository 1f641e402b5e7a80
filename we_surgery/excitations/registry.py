"""The family: every method that comes with the package, one line each."""

from __future__ import annotations

from we_surgery.excitations.base import Excitation
from we_surgery.excitations.building import register_excitation
from we_surgery.excitations.do_conv import DOConv
from we_surgery.excitations.dynamic_sparse import DynamicSparse
from we_surgery.excitations.expand import Expand
from we_surgery.excitations.gain import Gain
from we_surgery.excitations.gradient_only import LWEGradient, MWEGradient
from we_surgery.excitations.lwe import LWE
from we_surgery.excitations.mwe import MWE
from we_surgery.excitations.mwe_scheduled import MWEScheduled
from we_surgery.excitations.scaled_standardize import ScaledStandardize
from we_surgery.excitations.shift_attention import ShiftAttention
from we_surgery.excitations.spectral_norm import SpectralNorm
from we_surgery.excitations.standardize import Standardize
from we_surgery.excitations.weight_align import WeightAlign
from we_surgery.excitations.weight_compander import WeightCompander
from we_surgery.excitations.weight_norm import WeightNorm

_FAMILY: tuple[type[Excitation], ...] = (
    Standardize,
    WeightNorm,
    SpectralNorm,
    WeightAlign,
    LWE,
    MWE,
    DynamicSparse,
    ShiftAttention,
    ScaledStandardize,
    DOConv,
    Expand,
    Gain,
    WeightCompander,
    MWEGradient,
    LWEGradient,
    MWEScheduled,
)


for _method in _FAMILY:
    register_excitation(_method)
