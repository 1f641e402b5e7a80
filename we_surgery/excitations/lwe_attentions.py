"""LWE with the multipliers of CBAM, BAM and triplet attention, after the thesis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import (
    ACTIVATIONS,
    check_count,
    check_flag,
    kernel_mean,
    make_constant,
    spread,
)
from we_surgery.excitations.lwe import LWE, Widths
from we_surgery.excitations.lwe_options import Option, optional, skip_of

KERNEL = Option(None, optional(check_count))
"""The size, in each dimension, of convs over the positions of a kernel."""

_CONVS: tuple[Callable[..., nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class CBAMLWE(LWE, attention="cbam"):
    """CBAM on each filter, read as an image with I channels and the size of a kernel.

    Thesis, section 3.1.2, eqs. 3.1 to 3.4, as in its code::

        c_j = gate(mlp(mean_K(W_j)) + mlp(max_K(W_j)))             [I], one mlp for both
        s_j = gate(conv([max_I(V_j), mean_I(V_j)]))                [*K], of V_j = c_j W_j
        W'_j = c_j s_j W_j

    The conv has the layer's kernel size, as in the thesis' code; ``kernel=7`` gives the 7x7 of its
    text. With ``skip``, V_j = (1 + c_j) W_j and ``W'_j = ((1 + c_j) (1 + s_j) + c_j) W_j``: no
    weight gets smaller. ``skip`` with ``activation="leaky_relu"`` is the thesis' proposal (section
    3.2). A linear layer has no kernel, and only the channel part.

    Adds ``2 K + 1`` parameters to those of :class:`~we_surgery.excitations.LWE`.
    """

    takes: ClassVar[Mapping[str, Option]] = {**LWE.takes, "kernel": KERNEL}
    kernel: int | None
    spatial: nn.Module

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        super()._add_layers(widths, device, dtype)
        if widths.kernel:
            self.spatial = _make_conv(2, 1, _size(self.kernel, widths), device, dtype)

    def _multiplier(self, weight: Tensor) -> Tensor:
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

    def _start(self, weight: Tensor) -> float:
        super()._start(weight)
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
    """BAM on the O filters, read as a batch of images with I channels and the size of a kernel.

    Thesis, section 3.1.3, eqs. 3.5 and 3.6, without code or results::

        c = norm(fc2(relu(fc1(mean_K(W)))))                        [O, I]
        s = norm(conv1x1(relu(conv(relu(conv(relu(conv1x1(W)))))))) [O, 1, *K]
        W' = (1 + gate(c + s)) W

    The batch norms use the statistics of the filters, in eval mode too, so the excited weight
    depends on the weight alone and strips exactly. The two middle convs have the layer's kernel
    size, or ``kernel``; BAM dilates them by 4, which would see only padding on a map of the size
    of a kernel. A linear layer has only the first branch. ``skip=False`` drops the 1.
    """

    takes: ClassVar[Mapping[str, Option]] = {**LWE.takes, "skip": skip_of(True), "kernel": KERNEL}
    kernel: int | None
    channel_scale: nn.Parameter
    channel_shift: nn.Parameter
    spatial_scale: nn.Parameter
    spatial_shift: nn.Parameter
    spatial: nn.ModuleList

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        super()._add_layers(widths, device, dtype)
        channels, hidden = widths.channels, widths.hidden
        ones, zeros = (partial(f, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
        self.channel_scale = nn.Parameter(ones(channels))
        self.channel_shift = nn.Parameter(zeros(channels))
        if not widths.kernel:
            return
        self.spatial_scale = nn.Parameter(ones(1))
        self.spatial_shift = nn.Parameter(zeros(1))
        kernel = _size(self.kernel, widths)
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

    def _start(self, weight: Tensor) -> float:
        """Starts the norms with scale 0; the layers before them need no change."""
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
    """The mean of one gate per axis of a filter, each computed after pooling its axis.

    Thesis, section 3.1.3, on a 2-d kernel; a conv's two input channels are the ``[max; mean]`` of
    the pooled axis::

        g_0 = gate(conv(pool_I(W)))      [O, 1, kh, kw]
        g_1 = gate(conv(pool_kh(W)))     [O, I, 1, kw], the maps being I x kw
        g_2 = gate(conv(pool_kw(W)))     [O, I, kh, 1], the maps being kh x I
        W' = (g_0 + g_1 + g_2) / 3 W

    Kernels of another rank have more or fewer axes, linear weights one. The conv has the layer's
    kernel size, or ``kernel``; all axes share it, and it has ``2 K + 1`` parameters. With
    ``separate``, as in section 3.1.3 and in triplet attention, each axis has its own conv without
    bias, followed by a batch norm as in :class:`BAMLWE`. The thesis' public code does not train
    this attention: one version makes it anew in each forward pass, the other fails.
    """

    takes: ClassVar[Mapping[str, Option]] = {
        **{name: LWE.takes[name] for name in ("skip", "gate")},
        "kernel": KERNEL,
        "separate": Option(False, check_flag),
    }
    kernel: int | None
    separate: bool
    spatial: Any
    norm_scale: nn.Parameter
    norm_shift: nn.Parameter

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        kernel = _size(self.kernel, widths)
        if not self.separate:
            self.spatial = _make_conv(2, 1, kernel, device, dtype)
            return
        axes = 1 + len(kernel)
        make = partial(_make_conv, 2, 1, kernel, device, dtype, bias=False)
        self.spatial = nn.ModuleList(make() for _ in range(axes))
        self.norm_scale = nn.Parameter(torch.ones(axes, device=device, dtype=dtype))
        self.norm_shift = nn.Parameter(torch.zeros(axes, device=device, dtype=dtype))

    def _gated(self, weight: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for axis in range(1, weight.ndim):
            maps = self._convolved(_largest_and_mean(weight.transpose(1, axis)), axis - 1)
            total = total + ACTIVATIONS[self.gate](maps).transpose(1, axis)
        assert isinstance(total, Tensor)
        return (total / (weight.ndim - 1)).expand_as(weight)

    def _convolved(self, maps: Tensor, index: int) -> Tensor:
        if not self.separate:
            return _same_conv(maps, self.spatial)
        own = slice(index, index + 1)
        convolved = _same_conv(maps, self.spatial[index])
        return _batch_standardized(convolved, self.norm_scale[own], self.norm_shift[own])

    def _start(self, weight: Tensor) -> float:
        if self.separate:
            self.norm_scale.zero_()
            self.norm_shift.fill_(self.start_bias)
        else:
            make_constant(self.spatial, self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        weight = state["spatial.0.weight" if self.separate else "spatial.weight"]
        self._add_layers(Widths(1, 1, 1, tuple(weight.shape[2:])), "meta", weight.dtype)


def _size(kernel: int | None, widths: Widths) -> tuple[int, ...]:
    """The kernel size of a conv over the positions of a kernel; empty for a linear layer."""
    return widths.kernel if kernel is None else (kernel,) * len(widths.kernel)


def _make_conv(
    inputs: int,
    outputs: int,
    kernel: tuple[int, ...],
    device: Device,
    dtype: DType,
    *,
    bias: bool = True,
) -> nn.Module:
    """A conv of the kernel's rank, in torch's default initialization."""
    sizes = (inputs, outputs, kernel) if kernel else (inputs, outputs)
    return _CONVS[len(kernel)](*sizes, bias=bias, device=device, dtype=dtype)


def _same_conv(inputs: Tensor, conv: nn.Module) -> Tensor:
    """The conv on maps ``[N, C, *size]``, zero-padded to keep their size."""
    # Not get_parameter: a backward pass may replace parameters by tensors.
    own: Any = conv
    weight = own.weight.to(inputs.dtype)
    bias = None if own.bias is None else own.bias.to(inputs.dtype)
    kernel = weight.shape[2:]
    padding = [side for k in reversed(kernel) for side in ((k - 1) // 2, k // 2)]
    return _FUNCTIONS[len(kernel)](F.pad(inputs, padding) if padding else inputs, weight, bias)


def _largest_and_mean(filters: Tensor) -> Tensor:
    """``[O, 2, *size]``, over the second axis of ``[O, I, *size]``."""
    return torch.cat([filters.amax(1, keepdim=True), filters.mean(1, keepdim=True)], 1)


def _batch_standardized(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of ``[N, C, *]`` by the batch's own statistics; weight and bias ``[C]``."""
    dims = (0, *range(2, inputs.ndim))
    variance, mean = torch.var_mean(inputs, dims, correction=0, keepdim=True)
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    normed = (inputs - mean) * torch.rsqrt(variance + 1e-5)
    return normed * weight.to(inputs.dtype).view(shape) + bias.to(inputs.dtype).view(shape)
