"""LWE whose multiplier is that of CBAM: by channel, then by position in the kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from we_surgery.excitations.functions import ACTIVATIONS, kernel_mean, make_conv, same_conv, spread
from we_surgery.excitations.lwe import LWE


class CBAMLWE(LWE, attention="cbam"):
    """Each filter is taken for an image of I channels and the size of a kernel.

    Thesis, section 3.1.2, eqs. 3.1 to 3.4, in the form of its code::

        c_j = gate(mlp(mean_K(W_j)) + mlp(max_K(W_j)))             [I], one mlp for both
        s_j = gate(conv([max_I(V_j), mean_I(V_j)]))                [*K], of V_j = c_j W_j
        W'_j = c_j s_j W_j

    The conv has the layer's own kernel size; the thesis' text says 7x7. With ``skip``, which
    with ``activation="leaky_relu"`` is what the thesis proposes (section 3.2), V_j = (1 + c_j) W_j
    and ``W'_j = ((1 + c_j) (1 + s_j) + c_j) W_j``: no weight is made smaller. A linear layer,
    which has no kernel, has the channels' part alone.

    Adds ``2 K + 1`` parameters to those of :class:`~we_surgery.excitations.LWE`.
    """

    spatial: nn.Module

    def _add_layers(
        self,
        channels: int,
        hidden: int,
        kernel_size: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super()._add_layers(channels, hidden, kernel_size, device, dtype)
        if kernel_size:
            self.spatial = make_conv(2, 1, kernel_size, device, dtype)

    def multiplier(self, weight: Tensor) -> Tensor:
        """``[O, I, *K]`` for a weight ``[O, I, *K]`` of at least float32."""
        gate = ACTIVATIONS[self.gate]
        if weight.ndim == 2:
            channel = gate(2 * self._mlp(weight))
            return 1 + 2 * channel if self.skip else channel
        largest = weight.amax(tuple(range(2, weight.ndim)))
        channel = gate(self._mlp(kernel_mean(weight)) + self._mlp(largest))
        channel = spread(channel, weight)
        seen = weight * (1 + channel) if self.skip else weight * channel
        maps = torch.cat([seen.amax(1, keepdim=True), seen.mean(1, keepdim=True)], 1)
        spatial = gate(same_conv(maps, self.spatial))
        return (1 + channel) * (1 + spatial) + channel if self.skip else channel * spatial

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        super().start_constant(weight)
        channel, spatial = self.gate_at(2 * self.start_bias), self.gate_at(self.start_bias)
        if weight.ndim == 2:
            return 1 + 2 * channel if self.skip else channel
        nn.init.zeros_(self.spatial.get_parameter("weight"))
        nn.init.constant_(self.spatial.get_parameter("bias"), self.start_bias)
        return (1 + channel) * (1 + spatial) + channel if self.skip else channel * spatial

    def _pooled(self, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            return weight
        return torch.cat([kernel_mean(weight), weight.amax(tuple(range(2, weight.ndim)))])

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(state["spatial.weight"].shape[2:]) if "spatial.weight" in state else ()
