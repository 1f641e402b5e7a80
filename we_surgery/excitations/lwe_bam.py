"""LWE whose multiplier is that of BAM: a channel branch plus a branch of convs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from we_surgery.excitations.functions import (
    ACTIVATIONS,
    batch_standardized,
    kernel_mean,
    make_conv,
    same_conv,
    spread,
)
from we_surgery.excitations.lwe import LWE


class BAMLWE(LWE, attention="bam"):
    """The O filters are taken for a batch of images of I channels and the size of a kernel.

    Thesis, section 3.1.3, eqs. 3.5 and 3.6, which give neither code nor results::

        c = norm(fc2(relu(fc1(mean_K(W)))))                        [O, I]
        s = norm(conv1x1(relu(conv(relu(conv(relu(conv1x1(W)))))))) [O, 1, *K]
        W' = (1 + gate(c + s)) W

    The batch norms take the statistics of the filters themselves in training and in eval mode,
    so that the excited weight depends on nothing but the weight and strips exactly. The two
    middle convs have the layer's own kernel size; BAM dilates them by 4, which on a map as
    small as a kernel would see nothing but padding. A linear layer has the first branch alone.
    ``skip=False`` leaves the 1 out.
    """

    has_own_skip: ClassVar[bool] = True
    channel_scale: nn.Parameter
    channel_shift: nn.Parameter
    spatial_scale: nn.Parameter
    spatial_shift: nn.Parameter
    spatial: nn.ModuleList

    def _add_layers(
        self,
        channels: int,
        hidden: int,
        kernel_size: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super()._add_layers(channels, hidden, kernel_size, device, dtype)
        ones, zeros = (partial(f, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        self.channel_scale = nn.Parameter(ones(channels))
        self.channel_shift = nn.Parameter(zeros(channels))
        if not kernel_size:
            return
        self.spatial_scale = nn.Parameter(ones(1))
        self.spatial_shift = nn.Parameter(zeros(1))
        point = (1,) * len(kernel_size)
        self.spatial = nn.ModuleList(
            make_conv(inputs, outputs, kernel, device, dtype)
            for inputs, outputs, kernel in (
                (channels, hidden, point),
                (hidden, hidden, kernel_size),
                (hidden, hidden, kernel_size),
                (hidden, 1, point),
            )
        )

    def multiplier(self, weight: Tensor) -> Tensor:
        """``[O, I, *K]`` for a weight ``[O, I, *K]`` of at least float32."""
        pooled = self._mlp(kernel_mean(weight))
        total = batch_standardized(pooled, self.channel_scale, self.channel_shift)
        if weight.ndim > 2:
            first, *others = self.spatial
            maps = same_conv(weight, first)
            for conv in others:
                maps = same_conv(ACTIVATIONS[self.activation](maps), conv)
            maps = batch_standardized(maps, self.spatial_scale, self.spatial_shift)
            total = spread(total, weight) + maps
        gated = ACTIVATIONS[self.gate](total)
        return 1 + gated if self.skip else gated

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        """Starts the norms at a scale of 0, so that the layers before them stay as they are."""
        self._wake_units(weight)
        nn.init.zeros_(self.channel_scale)
        nn.init.constant_(self.channel_shift, self.start_bias)
        if weight.ndim > 2:
            nn.init.zeros_(self.spatial_scale)
            nn.init.zeros_(self.spatial_shift)
        return self.skip + self.gate_at(self.start_bias)

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(state["spatial.1.weight"].shape[2:]) if "spatial_scale" in state else ()
