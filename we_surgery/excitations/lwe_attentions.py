"""LWE with the multipliers of CBAM, BAM and triplet attention, as the thesis has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import ACTIVATIONS, kernel_mean, spread
from we_surgery.excitations.lwe import LWE, make_constant

_CONVS: tuple[Callable[..., nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


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
        self, channels: int, hidden: int, kernel: tuple[int, ...], device: Device, dtype: DType
    ) -> None:
        super()._add_layers(channels, hidden, kernel, device, dtype)
        if kernel:
            self.spatial = _make_conv(2, 1, kernel, device, dtype)

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
        spatial = gate(_same_conv(_largest_and_mean(seen), self.spatial))
        return (1 + channel) * (1 + spatial) + channel if self.skip else channel * spatial

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        super().start_constant(weight)
        channel, spatial = self.gate_at(2 * self.start_bias), self.gate_at(self.start_bias)
        if weight.ndim == 2:
            return 1 + 2 * channel if self.skip else channel
        make_constant(self.spatial, self.start_bias)
        return (1 + channel) * (1 + spatial) + channel if self.skip else channel * spatial

    def _pooled(self, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            return weight
        return torch.cat([kernel_mean(weight), weight.amax(tuple(range(2, weight.ndim)))])

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(state["spatial.weight"].shape[2:]) if "spatial.weight" in state else ()


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
        self, channels: int, hidden: int, kernel: tuple[int, ...], device: Device, dtype: DType
    ) -> None:
        super()._add_layers(channels, hidden, kernel, device, dtype)
        ones, zeros = (partial(f, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        self.channel_scale = nn.Parameter(ones(channels))
        self.channel_shift = nn.Parameter(zeros(channels))
        if not kernel:
            return
        self.spatial_scale = nn.Parameter(ones(1))
        self.spatial_shift = nn.Parameter(zeros(1))
        point = (1,) * len(kernel)
        self.spatial = nn.ModuleList(
            [
                _make_conv(channels, hidden, point, device, dtype),
                _make_conv(hidden, hidden, kernel, device, dtype),
                _make_conv(hidden, hidden, kernel, device, dtype),
                _make_conv(hidden, 1, point, device, dtype),
            ]
        )

    def _gated(self, weight: Tensor) -> Tensor:
        pooled = self._mlp(kernel_mean(weight))
        total = _batch_standardized(pooled, self.channel_scale, self.channel_shift)
        if weight.ndim > 2:
            first, *others = self.spatial
            maps = _same_conv(weight, first)
            for conv in others:
                maps = _same_conv(ACTIVATIONS[self.activation](maps), conv)
            maps = _batch_standardized(maps, self.spatial_scale, self.spatial_shift)
            total = spread(total, weight) + maps
        return ACTIVATIONS[self.gate](total)

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        """Starts the norms at a scale of 0, so that the layers before them stay as they are."""
        self._wake_units(weight)
        self.channel_scale.zero_()
        self.channel_shift.fill_(self.start_bias)
        if weight.ndim > 2:
            self.spatial_scale.zero_()
            self.spatial_shift.zero_()
        return self.skip + self.gate_at(self.start_bias)

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(state["spatial.1.weight"].shape[2:]) if "spatial_scale" in state else ()


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
        self, channels: int, hidden: int, kernel: tuple[int, ...], device: Device, dtype: DType
    ) -> None:
        self.spatial = _make_conv(2, 1, kernel, device, dtype)

    def _gated(self, weight: Tensor) -> Tensor:
        gates = []
        for axis in range(1, weight.ndim):
            maps = _largest_and_mean(weight.transpose(1, axis))
            gates.append(ACTIVATIONS[self.gate](_same_conv(maps, self.spatial)).transpose(1, axis))
        total = gates[0]
        for gate in gates[1:]:
            total = total + gate
        return (total / len(gates)).expand_as(weight)

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        make_constant(self.spatial, self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        weight = state["spatial.weight"]
        self._add_layers(1, 1, tuple(weight.shape[2:]), "meta", weight.dtype)


def _make_conv(
    inputs: int, outputs: int, kernel: tuple[int, ...], device: Device, dtype: DType
) -> nn.Module:
    """A conv of the kernel's rank with bias, in torch's default initialization."""
    sizes = (inputs, outputs, kernel) if kernel else (inputs, outputs)
    return _CONVS[len(kernel)](*sizes, device=device, dtype=dtype)


def _same_conv(inputs: Tensor, conv: nn.Module) -> Tensor:
    """The conv on maps ``[N, C, *size]``, zero-padded so that their size stays.

    An odd kernel is padded by half its size on both sides, an even one by one more behind.
    """
    # Not get_parameter: a backward pass may put other tensors in the parameters' place.
    own: Any = conv
    weight, bias = (tensor.to(inputs.dtype) for tensor in (own.weight, own.bias))
    kernel = weight.shape[2:]
    padding = [side for k in reversed(kernel) for side in ((k - 1) // 2, k // 2)]
    return _FUNCTIONS[len(kernel)](F.pad(inputs, padding) if padding else inputs, weight, bias)


def _largest_and_mean(filters: Tensor) -> Tensor:
    """``[O, 2, *size]``, over the second axis of ``[O, I, *size]``."""
    return torch.cat([filters.amax(1, keepdim=True), filters.mean(1, keepdim=True)], 1)


def _batch_standardized(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of ``[N, C, *]`` by the batch's own statistics, also in eval mode.

    ``weight`` and ``bias`` are ``[C]``; 1e-5 is added to the variance.
    """
    dims = (0, *range(2, inputs.ndim))
    variance, mean = torch.var_mean(inputs, dims, correction=0, keepdim=True)
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    normed = (inputs - mean) * torch.rsqrt(variance + 1e-5)
    return normed * weight.to(inputs.dtype).view(shape) + bias.to(inputs.dtype).view(shape)
