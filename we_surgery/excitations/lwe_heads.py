"""LWE whose locations are the heads of a transformer's attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import check_count
from we_surgery.excitations.lwe import LWE, Widths
from we_surgery.excitations.lwe_options import Option, one_of

LAYERS = ("qkv", "q", "proj")


class HeadsLWE(LWE, attention="heads"):
    """LWE on a linear weight whose kernels are the rows, or the columns, of a head.

    The rows of a ``qkv`` layer (``3 heads d x I``) are ``3 heads`` filters with kernels of d
    weights, which gives ``3 heads x I`` multipliers. The columns of a ``proj`` layer
    (``O x heads d``) are ``heads`` input channels with such kernels, which gives ``O x heads``.
    Average and multiplier are those of :class:`~we_surgery.excitations.LWE`, and so are the other
    options. Not in the papers.

    ``heads``: how many the layer has.

    ``layer``: ``qkv``, also ``nn.MultiheadAttention``'s ``in_proj_weight``; ``q`` for a q, k or v
    layer of its own; or ``proj``. The hidden width is that of all input channels in each.
    """

    takes: ClassVar[Mapping[str, Option]] = {
        **LWE.takes,
        "heads": Option(None, check_count),
        "layer": Option("qkv", one_of(LAYERS)),
    }
    heads: int
    layer: str

    @property
    def _axis(self) -> int:
        """The axis that the heads divide."""
        return 1 if self.layer == "proj" else 0

    @property
    def _blocks(self) -> int:
        return 3 * self.heads if self.layer == "qkv" else self.heads

    @classmethod
    def _unfit_kernel(cls, kernel: tuple[int, ...]) -> str | None:
        return "is a conv, which has no heads" if kernel else None

    def _check(self, widths: Widths) -> None:
        super()._check(widths)
        size, what = [(widths.filters, "rows"), (widths.channels, "columns")][self._axis]
        if size % self._blocks:
            times = "3 x " if self.layer == "qkv" else ""
            raise ValueError(
                f"lwe: {times}{self.heads} heads do not divide the {size} {what} of a "
                f"{self.layer} layer"
            )

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        channels = self.heads if self.layer == "proj" else widths.channels
        super()._add_layers(widths._replace(channels=channels), device, dtype)

    def _gated(self, weight: Tensor) -> Tensor:
        by_head = super()._gated(weight)
        return by_head.repeat_interleave(weight.shape[self._axis] // self._blocks, self._axis)

    def _pooled(self, weight: Tensor) -> Tensor:
        """``[3 heads, I]``, ``[heads, I]`` or ``[O, heads]``."""
        return torch.unflatten(weight, self._axis, (self._blocks, -1)).mean(self._axis + 1)
