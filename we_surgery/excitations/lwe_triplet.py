"""LWE whose multiplier is that of triplet attention: each axis of a filter pooled in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.functions import ACTIVATIONS, make_conv, same_conv
from we_surgery.excitations.lwe import LWE


class TripletLWE(LWE, attention="triplet"):
    """The mean of one gate for each axis of a filter, the axis being pooled.

    Thesis, section 3.1.3, on a 2-d kernel, with the ``[max; mean]`` of an axis as the two
    channels that one conv, the same for all axes, sees::

        g_0 = gate(conv(pool_I(W)))      [O, 1, kh, kw]
        g_1 = gate(conv(pool_kh(W)))     [O, I, 1, kw], the maps being I x kw
        g_2 = gate(conv(pool_kw(W)))     [O, I, kh, 1], the maps being kh x I
        W' = (g_0 + g_1 + g_2) / 3 W

    A kernel of another rank has as many axes more or less, a linear weight one. The conv has
    the layer's own kernel size and ``2 K + 1`` parameters. The thesis' public code trains no
    such attention: one version makes it anew in each forward pass, the other fails.
    """

    lacks: ClassVar[tuple[str, ...]] = (*LWE.lacks, "reduction", "activation", "inner")
    spatial: nn.Module

    def _add_layers(
        self,
        channels: int,
        hidden: int,
        kernel_size: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.spatial = make_conv(2, 1, kernel_size, device, dtype)

    def multiplier(self, weight: Tensor) -> Tensor:
        """``[O, I, *K]`` for a weight ``[O, I, *K]`` of at least float32."""
        gates = [self._gate_of(weight, axis) for axis in range(1, weight.ndim)]
        total = gates[0]
        for gate in gates[1:]:
            total = total + gate
        mean = (total / len(gates)).expand_as(weight)
        return 1 + mean if self.skip else mean

    def _gate_of(self, weight: Tensor, axis: int) -> Tensor:
        """The gate with ``axis`` pooled, of size 1 in it."""
        turned = weight.transpose(1, axis)
        maps = torch.cat([turned.amax(1, keepdim=True), turned.mean(1, keepdim=True)], 1)
        return ACTIVATIONS[self.gate](same_conv(maps, self.spatial)).transpose(1, axis)

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        nn.init.zeros_(self.spatial.get_parameter("weight"))
        nn.init.constant_(self.spatial.get_parameter("bias"), self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        weight = state["spatial.weight"]
        self._add_layers(1, 1, tuple(weight.shape[2:]), torch.device("meta"), weight.dtype)
