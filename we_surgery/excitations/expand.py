"""ExpandNets: three linear convs instead of one, 1x1, k x k and 1x1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import check_count
from we_surgery.excitations.layout import WeightLayout


class Expand(Excitation):
    """``W'[o, i, k] = sum_pq after[o, p] core[p, q, k] before[q, i]``: 1x1 . k x k . 1x1.

    Guo et al. (NeurIPS 2020, arXiv 1811.10495), ExpandNet-CL: the conv between the two 1x1 convs
    has r times the input and output channels (``rate``, at least 2, 4 in the paper), and there are
    no activations between them. The layer's own weight keeps its shape and is the core's first
    O x I block; the rest is held here. Each group of a grouped conv is expanded separately, as the
    authors do for depthwise convs; a linear layer has a kernel of one position. All three start as
    torch's convs do. With ``preserve``, the 1x1 convs pass on only the layer's own block at first,
    and the other blocks learn from the second step on.

    Parameters are ``before``, ``[g, r I, I]``, ``after``, ``[g, O / g, r O / g]``, and the rest of
    the core: ``beside``, ``[g, O / g, (r - 1) I, *K]``, and ``below``,
    ``[g, (r - 1) O / g, r I, *K]``.
    """

    name: ClassVar[str] = "expand"
    order: ClassVar[int] = -30
    summary: ClassVar[str] = "the product of three linear convs, 1x1, k x k and 1x1"
    source: ClassVar[str] = "Guo et al., ExpandNets (arXiv 1811.10495), ExpandNet-CL"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, rate 4: MobileNet 66.48 -> 69.40 top-1, MobileNetV2 63.75 -> 65.62, "
        "ShuffleNetV2 0.5x 56.89 -> 57.38 (README of GUOShuxuan/expandnets)",
        "CIFAR-10, small nets: 3x3 kernels 73.32 -> 73.96; 7x7 78.63 -> 78.47, which did not help",
    )

    before: nn.Parameter
    after: nn.Parameter
    beside: nn.Parameter
    below: nn.Parameter

    def __init__(
        self,
        groups: int,
        outputs: int,
        channels: int,
        kernel_size: tuple[int, ...],
        rate: int = 4,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.rate = check_count("expand: rate", rate, 2)
        wide, tall = rate * channels, rate * outputs
        fan_in = wide * math.prod(kernel_size)
        parts: dict[str, tuple[int, tuple[int, ...]]] = {
            "before": (channels, (groups, wide, channels)),
            "after": (tall, (groups, outputs, tall)),
            "beside": (fan_in, (groups, outputs, wide - channels, *kernel_size)),
            "below": (fan_in, (groups, tall - outputs, wide, *kernel_size)),
        }
        for name, (seen, shape) in parts.items():
            values = torch.empty(shape, device=device, dtype=dtype)
            bound = seen**-0.5
            self.register_parameter(name, nn.Parameter(values.uniform_(-bound, bound)))

    def excite(self, weight: Tensor) -> Tensor:
        parts = (self.before, self.after, self.beside, self.below)
        before, after, beside, below = (part.to(weight.dtype) for part in parts)
        groups, outputs = after.shape[:2]
        own = weight.reshape(groups, outputs, *weight.shape[1:])
        core = torch.cat([torch.cat([own, beside], 2), below], 1)
        mixed = (after @ core.flatten(2)).reshape(groups, outputs, core.shape[2], -1)
        return (before.mT.unsqueeze(1) @ mixed).reshape(weight.shape)

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        for matrix in (self.before, self.after):
            matrix.zero_()
            matrix.diagonal(dim1=1, dim2=2).fill_(1)
        return Affine()

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return (
            layout.groups,
            layout.out_channels // layout.groups,
            layout.channels,
            layout.kernel_size,
        )

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        groups, outputs, _ = state["after"].shape
        return groups, outputs, state["before"].shape[2], tuple(state["below"].shape[3:])
