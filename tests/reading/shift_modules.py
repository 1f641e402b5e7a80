"""Sixteen ways of writing a channel shift, and eight movements that are none.

Each module ends in a conv or linear called ``target``; ``SHIFTS`` and ``DECOYS`` give the
module and its input shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Around(nn.Module):
    """A conv, some movement of data, and the conv in question."""

    def __init__(self, move: Callable[[Tensor], Tensor], channels: int = 8, dims: int = 2) -> None:
        super().__init__()
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first = conv(3, channels, 1)
        self.move = move
        self.target = conv(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.move(self.first(x)))


class ChannelsLast(nn.Module):
    """Linear layers on [N, H, W, C] around a movement."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.move = move
        self.target = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.move(self.first(x)))


def temporal_slice_assignment(x: Tensor, segments: int = 4) -> Tensor:
    nt, c, h, w = x.shape
    x = x.view(nt // segments, segments, c, h, w)
    out = torch.zeros_like(x)
    out[:, :-1, :2] = x[:, 1:, :2]
    out[:, 1:, 2:4] = x[:, :-1, 2:4]
    out[:, :, 4:] = x[:, :, 4:]
    return out.view(nt, c, h, w)


class _TemporalFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return temporal_slice_assignment(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rolled(x: Tensor) -> Tensor:
    left, right, rest = x.split([2, 2, 4], 1)
    return torch.cat([left.roll(1, 3), right.roll(-1, 3), rest], 1)


def pad_slice_cat(x: Tensor) -> Tensor:
    left = F.pad(x[:, :4], (1, 0))[..., :-1]
    right = F.pad(x[:, 4:], (0, 1))[..., 1:]
    return torch.cat([left, right], 1)


def spatial_slice_assignment(x: Tensor) -> Tensor:
    """The S2-MLP way, in place on a clone."""
    out = x.clone()
    out[:, :2, 1:] = x[:, :2, :-1]
    out[:, 2:4, :-1] = x[:, 2:4, 1:]
    out[:, 4:6, :, 1:] = x[:, 4:6, :, :-1]
    out[:, 6:, :, :-1] = x[:, 6:, :, 1:]
    return out


def cat_of_slices(x: Tensor) -> Tensor:
    up = torch.cat([x[:, :4, 1:], torch.zeros_like(x[:, :4, :1])], 2)
    return torch.cat([up, x[:, 4:]], 1)


def gathered(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    step = torch.arange(c).remainder(3).sub(1).view(1, c, 1, 1)
    index = (torch.arange(w).view(1, 1, 1, w) + step).remainder(w).expand(n, c, h, w)
    return x.gather(3, index)


class GridIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        step = torch.arange(8).remainder(3).sub(1).view(8, 1)
        self.register_buffer("columns", (torch.arange(6).view(1, 6) + step).clamp(0, 5))

    def forward(self, x: Tensor) -> Tensor:
        channels = torch.arange(8).view(8, 1)
        return x.transpose(1, 2)[:, :, channels, self.columns].transpose(1, 2)


def _one_hot(channels: int = 8) -> Tensor:
    kernel = torch.zeros(channels, 1, 3, 3)
    for channel in range(channels):
        kernel[channel, 0, channel % 3, channel // 3 % 3] = 1
    return kernel


class OneHotBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", _one_hot())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=8)


class OneHotFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(_one_hot(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=8)


def one_hot_module() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    conv.weight.data.copy_(_one_hot())
    return conv.requires_grad_(False)


def with_norm_and_activation() -> nn.Module:
    class Move(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(rolled(x)))

    return Move()


def five_dimensional(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2, :-1] = x[:, :2, 1:]
    out[:, 2:4, 1:] = x[:, 2:4, :-1]
    out[:, 4:] = x[:, 4:]
    return out


def axial(x: Tensor) -> Tensor:
    """The AS-MLP way: pad, chunk, roll each chunk, cat, narrow."""
    h, w = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    chunks = [c.roll(s, 2) for c, s in zip(padded.chunk(3, 1), (-1, 0, 1), strict=True)]
    return torch.cat(chunks, 1).narrow(2, 1, h).narrow(3, 1, w)


def channels_last_shift(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, 1:, :, :4] = x[:, :-1, :, :4]
    out[:, :-1, :, 4:] = x[:, 1:, :, 4:]
    return out


IMAGE, VIDEO, CLIP, LAST = (4, 3, 6, 6), (8, 3, 5, 5), (2, 3, 4, 5, 5), (2, 6, 6, 3)

SHIFTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tsm slice assignment": (lambda: Around(temporal_slice_assignment), VIDEO),
    "tsm autograd function": (lambda: Around(_TemporalFunction.apply), VIDEO),
    "roll": (lambda: Around(rolled), IMAGE),
    "pad, slice, cat": (lambda: Around(pad_slice_cat), IMAGE),
    "s2 slice assignment": (lambda: Around(spatial_slice_assignment), IMAGE),
    "cat of slices": (lambda: Around(cat_of_slices), IMAGE),
    "gather": (lambda: Around(gathered), IMAGE),
    "grid index": (lambda: Around(GridIndex()), IMAGE),
    "one-hot buffer": (lambda: Around(OneHotBuffer()), IMAGE),
    "one-hot frozen parameter": (lambda: Around(OneHotFrozen()), IMAGE),
    "one-hot module": (lambda: Around(one_hot_module()), IMAGE),
    "norm and activation between": (lambda: Around(with_norm_and_activation()), IMAGE),
    "five-dimensional": (lambda: Around(five_dimensional, dims=3), CLIP),
    "as-mlp": (lambda: Around(axial, channels=9), IMAGE),
    "channels-last linear": (lambda: ChannelsLast(channels_last_shift), LAST),
    "dropout between": (
        lambda: Around(nn.Sequential(with_norm_and_activation(), nn.Dropout(0.1))),
        IMAGE,
    ),
}


def unfolded(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return F.unfold(x, 3, padding=1).view(n, 9 * c, h, w)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SkipConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :4], self.conv(x)], 1)


DECOYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "uniform roll": (lambda: Around(lambda x: x.roll((1, 1), (2, 3))), IMAGE),
    "space to depth": (lambda: Around(nn.PixelUnshuffle(2), 8), IMAGE),
    "unfold": (lambda: Around(unfolded), IMAGE),
    "channel shuffle": (lambda: Around(shuffled), IMAGE),
    "same padding": (lambda: Around(lambda x: F.pad(x, (0, 1, 0, 1))), IMAGE),
    "skip concat": (lambda: Around(SkipConcat()), IMAGE),
    "learned depthwise": (lambda: Around(nn.Conv2d(8, 8, 3, padding=1, groups=8)), IMAGE),
    "none": (lambda: Around(nn.ReLU()), IMAGE),
}


def _widen(module: nn.Module, factor: int) -> nn.Module:
    assert isinstance(module, Around)
    module.target = nn.Conv2d(8 * factor, 8, 1)
    return module


DECOYS["space to depth"] = (lambda: _widen(Around(nn.PixelUnshuffle(2)), 4), IMAGE)
DECOYS["unfold"] = (lambda: _widen(Around(unfolded), 9), IMAGE)
