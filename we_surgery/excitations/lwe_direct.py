"""LWE with a map of learned multipliers, the WE paper's alternative to its small net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import check_count
from we_surgery.excitations.lwe import LWE, Widths
from we_surgery.excitations.lwe_options import Option, optional


class DirectLWE(LWE, attention="direct"):
    """``W * sigmoid(P)`` with a parameter P of ``O x I``, whatever the weight is.

    WE paper, section 3.2, "a simple approach", with around 60 % more parameters on ResNet50: 52 %
    in its convs, 60 % with the last linear layer. P starts at 0, so all multipliers start at 1/2;
    the paper gives no start.

    With a ``rank`` r, ``P = U V^T``: ``U``, ``[O, r]``, starts at 0, and ``V``, ``[I, r]``, like a
    linear layer's weight.
    """

    takes: ClassVar[Mapping[str, Option]] = {
        "skip": LWE.takes["skip"],
        "rank": Option(None, optional(check_count)),
    }
    rank: int | None
    map: nn.Parameter
    by_filter: nn.Parameter
    by_channel: nn.Linear

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        columns = widths.channels if self.rank is None else self.rank
        start = torch.zeros(widths.filters, columns, device=device, dtype=dtype)
        if self.rank is None:
            self.map = nn.Parameter(start)
            return
        self.by_filter = nn.Parameter(start)
        self.by_channel = nn.Linear(
            self.rank, widths.channels, bias=False, device=device, dtype=dtype
        )

    def _gated(self, weight: Tensor) -> Tensor:
        if self.rank is None:
            return torch.sigmoid(self.map.to(weight.dtype))
        by_channel = self.by_channel.weight.to(weight.dtype)
        return torch.sigmoid(self.by_filter.to(weight.dtype) @ by_channel.T)

    def _start(self, weight: Tensor) -> float:
        (self.map if self.rank is None else self.by_filter).zero_()
        return self.skip + 0.5

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        if self.rank is None:
            filters, channels = state["map"].shape
        else:
            filters, channels = len(state["by_filter"]), len(state["by_channel.weight"])
        dtype = next(iter(state.values())).dtype
        self._add_layers(Widths(filters, channels, 1, ()), "meta", dtype)
