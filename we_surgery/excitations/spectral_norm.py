"""Spectral normalization: the whole weight over its largest singular value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.layout import WeightLayout

_EPSILON = 1e-12
_FIRST_ITERATIONS = 15


class SpectralNorm(Excitation):
    """``W / (u^T W v)``, W read as a matrix of its O filters by N weights each.

    Miyato et al., a baseline of the WE paper, as
    ``torch.nn.utils.parametrizations.spectral_norm`` computes it. u and v, of at least float32, are
    buffers that approach the singular vectors of the largest singular value: 15 steps of the power
    iteration at conversion, and one before each forward pass in training. Strip folds what eval
    mode computes. The matrix of a grouped transposed conv has the filters of all groups as rows;
    torch's has the first axis of the stored tensor. A weight of zeros stays zero.
    """

    name: ClassVar[str] = "spectral_norm"
    order: ClassVar[int] = 0
    summary: ClassVar[str] = "the weight over its largest singular value"
    source: ClassVar[str] = "Miyato et al., Spectral Normalization; WE paper, Table 2"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.8 -> 75.7 top-1: it did not help (WE paper, Table 2)",
    )
    deploys_to: ClassVar[str] = "the vanilla layer, bit-equal to eval mode"
    u: Tensor
    v: Tensor

    def __init__(
        self, out_channels: int, fan_in: int, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        for name, size in (("u", out_channels), ("v", fan_in)):
            start = torch.randn(size, device=device, dtype=precision)
            self.register_buffer(name, F.normalize(start, dim=0, eps=_EPSILON))

    def excite(self, weight: Tensor) -> Tensor:
        sigma = self._sigma(weight)
        return weight / torch.where(sigma == 0, torch.ones_like(sigma), sigma)

    def _sigma(self, weight: Tensor) -> Tensor:
        # Copies, since the next forward pass updates the buffers.
        u, v = (buffer.to(weight.dtype, copy=True) for buffer in (self.u, self.v))
        return torch.dot(u, torch.mv(weight.flatten(1), v))

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        self._iterate(weight, 1)

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        self._iterate(weight, _FIRST_ITERATIONS)

    def _iterate(self, weight: Tensor, steps: int) -> None:
        matrix = weight.flatten(1).to(self.u.dtype)
        for _ in range(steps):
            self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=_EPSILON))
            self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=_EPSILON))

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        self.prepare(weight)
        sigma = self._sigma(weight).expand(weight.shape[0])
        gain = torch.where(sigma == 0, torch.ones_like(sigma), sigma)
        return Affine(gain, torch.zeros_like(gain))

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return layout.out_channels, layout.fan_in

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return len(state["u"]), len(state["v"])
