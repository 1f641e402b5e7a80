"""Dynamic Sparse Training: weights below their filter's trained threshold are zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from we_surgery.excitations.base import Device, DType, Excitation
from we_surgery.excitations.functions import check_flag, kernel_mean, spread
from we_surgery.excitations.layout import WeightLayout

_KEPT_AT_LEAST = 0.01


class DynamicSparse(Excitation):
    """``W_j * step(|W_j| - t_j)`` for each filter j, with a trained threshold t_j from 0 on.

    Liu et al. (ICLR 2020); the WE paper's supplement combines it with LWE. The step's gradient is
    the paper's long-tailed estimate, :func:`long_tailed_slope`. It reaches t and, in addition to
    what the mask passes, W. Add ``ws.sparsity_loss(model)`` to the loss; it drives the thresholds,
    the parameter ``threshold``, ``[O]``, up. If at most 1 % of a layer's weights would be left, its
    thresholds count as 0, and training sets them to 0. It masks the output of other stages, so
    the stripped weight is sparse; standardized weights have sizes of about 1, another scale for
    the thresholds than that of raw weights.

    Args:
        out_channels: O, the layer's filters.
        kernels: masks whole kernels, by the mean magnitude of their weights. After LWE these are
            the kernels with low multipliers. Not in the papers.
        device, dtype: those of the layer.
    """

    name: ClassVar[str] = "dynamic_sparse"
    forms: ClassVar[str] = "both; `ws.sparsity_loss` with the converted one"
    order: ClassVar[int] = 30
    summary: ClassVar[str] = "weights below a trained threshold of their filter are zero"
    source: ClassVar[str] = "Liu et al., Dynamic Sparse Training; WE supplement, section 3"
    published: ClassVar[tuple[str, ...]] = (
        "CIFAR-10, WRN-16-8: keeps 11 % of the weights at -0.13 % accuracy; with LWE 10 % at "
        "-0.1 % (WE supplement)",
    )
    deploys_to: ClassVar[str] = "the vanilla layer, bit-equal, its masked weights exact zeros"

    def __init__(
        self,
        out_channels: int,
        kernels: bool = False,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.kernels = check_flag("dynamic_sparse: kernels", kernels)
        self.threshold = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))

    def excite(self, weight: Tensor) -> Tensor:
        threshold = self.threshold.to(weight.dtype)
        kept = self._is_enough_kept(weight.detach(), threshold.detach())
        threshold = torch.where(kept, threshold, torch.zeros_like(threshold))
        size = self._size(weight)
        over = spread(size - spread(threshold, size), weight)
        mask = (over > 0).to(weight.dtype)
        if not torch.is_grad_enabled():
            return weight * mask
        # The added term is 0; it gives the step a gradient.
        return weight * (mask + long_tailed_slope(over.detach()) * (over - over.detach()))

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        kept = self._is_enough_kept(weight, self.threshold.to(weight.dtype))
        # Without a new version: `excite` uses 0 for these thresholds already, so graphs that have
        # read them stay valid, and a layer may run twice in a forward pass.
        with _unsafe_preserve_version_counter(self.threshold):
            self.threshold.mul_(kept.to(self.threshold.dtype))

    def _size(self, weight: Tensor) -> Tensor:
        return kernel_mean(weight.abs()) if self.kernels else weight.abs()

    def _is_enough_kept(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """Whether more than 1 % of the layer's weights exceed the thresholds; 0-d."""
        size = self._size(weight)
        return (size > spread(threshold, size)).float().mean() > _KEPT_AT_LEAST

    @torch.no_grad()
    def start_inverse(self, weight: Tensor) -> Tensor:
        self.threshold.zero_()
        return weight

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return (layout.out_channels,)

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return (len(state["threshold"]),)


def long_tailed_slope(over: Tensor) -> Tensor:
    """The derivative used for the step: ``2 - 4 |q|`` up to 0.4, 0.4 up to 1, then 0."""
    distance = over.abs()
    tail = torch.where(distance <= 1, 0.4, 0.0).to(over.dtype)
    return torch.where(distance <= 0.4, 2 - 4 * distance, tail)
