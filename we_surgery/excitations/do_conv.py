"""DO-Conv: a depthwise conv composed with the layer's own; both are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.layout import WeightLayout


class DOConv(Excitation):
    """``W'[o, i, m] = sum_s D_i[m, s] W[o, i, s]``, with a trained K x K matrix D_i per channel.

    Cao et al. (TIP 2022, arXiv 2006.12030). m and s are positions of a kernel; all filters that
    read input channel i share D_i. D is ``1 + residual`` and the residual, ``[C, K, K]``, starts at
    0: the layer's outputs do not change at first, and weight decay draws D to the identity. The
    depth multiplier is the paper's default, the number K of positions; a larger one would change
    the weight's shape. In a grouped conv each of the C input channels has its own matrix, as in
    the paper; the authors' code pairs them with channels of other groups. Kernels of one position
    are skipped, as in that code.
    """

    name: ClassVar[str] = "do_conv"
    order: ClassVar[int] = -20
    summary: ClassVar[str] = "a trained map of each input channel's kernel positions"
    source: ClassVar[str] = "Cao et al., DO-Conv (arXiv 2006.12030)"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet-v1: 18 layers 70.87 +0.82, 50 layers 77.32 +0.08, 152 layers 79.34 "
        "+0.07; MobileNet-v2 71.89 +0.16 (README of yangyanli/DO-Conv)",
    )

    def __init__(
        self, in_channels: int, positions: int, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        if positions < 2:
            raise ValueError("do_conv: a kernel of one position has nothing to combine")
        shape = (in_channels, positions, positions)
        self.residual = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def excite(self, weight: Tensor) -> Tensor:
        residual = self.residual.to(weight.dtype)
        channels, positions = weight.shape[1], residual.shape[1]
        by_group = residual.view(-1, 1, channels, positions, positions)
        kernels = weight.reshape(by_group.shape[0], -1, channels, positions, 1)
        return weight + (by_group @ kernels).reshape(weight.shape)

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        self.residual.zero_()
        return Affine()

    @classmethod
    def unsupported_reason(cls, layout: WeightLayout, options: Mapping[str, Any]) -> str | None:
        is_single = math.prod(layout.kernel_size) < 2
        return "has kernels of one position, with nothing to combine" if is_single else None

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return layout.in_channels, math.prod(layout.kernel_size)

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(state["residual"].shape[:2])
