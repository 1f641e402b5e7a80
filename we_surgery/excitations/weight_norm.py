"""Weight normalization: each filter's length is a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import spread
from we_surgery.excitations.layout import WeightLayout


class WeightNorm(Excitation):
    """``g_j * W_j / |W_j|`` for each filter j, with a trained g_j that starts at ``|W_j|``.

    Salimans and Kingma, a baseline of the WE paper; g is the parameter ``magnitude``, ``[O]``. As
    ``torch.nn.utils.parametrizations.weight_norm``, but per output filter for transposed convs
    too, for which torch's default ``dim=0`` takes input channels. Conversion does not change the
    model's outputs. A filter of zeros stays zero.
    """

    name: ClassVar[str] = "weight_norm"
    order: ClassVar[int] = 0
    summary: ClassVar[str] = "each filter's length as a parameter of its own"
    source: ClassVar[str] = "Salimans and Kingma, Weight Normalization; WE paper, Table 2"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.8 -> 76.0 top-1 (WE paper, Table 2)",
        "ImageNet, ResNet50 with GN: 75.5 -> 75.9 (WE paper, Table 4)",
    )

    def __init__(self, out_channels: int, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(torch.ones(out_channels, device=device, dtype=dtype))

    def excite(self, weight: Tensor) -> Tensor:
        norm = _norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
        return weight * spread(self.magnitude.to(weight.dtype) / norm, weight)

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        self.magnitude.copy_(_norm(weight))

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        self.prepare(weight)
        # Tensors, and not the number 1, which would claim it for all multiples of the weight.
        rounded = self.magnitude.to(weight.dtype)
        gain = torch.where(rounded == 0, torch.ones_like(rounded), _norm(weight) / rounded)
        return Affine(gain, torch.zeros_like(gain))

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return (layout.out_channels,)

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return (len(state["magnitude"]),)


def _norm(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norm
