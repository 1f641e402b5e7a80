"""Networks with gates as segmentation, depth and audio libraries build them, on both readings.

The networks are small, and their blocks have the structure of those that they are named after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.reading import read


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class AttentionBlock(nn.Module):
    """The grid attention of an Attention U-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.w_g = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4))
        self.w_x = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4))
        self.psi = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        return x * self.psi(F.relu(self.w_g(g) + self.w_x(x)))


class AttentionLevel(nn.Module):
    """One level of an Attention U-Net around a deeper one."""

    def __init__(self, channels: int, deeper: nn.Module) -> None:
        super().__init__()
        self.down = conv(channels, 2 * channels)
        self.deeper = deeper
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.attention = AttentionBlock(channels)
        self.merge = conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.deeper(self.down(F.max_pool2d(x, 2))))
        return self.merge(torch.cat([self.attention(up, x), up], 1))


def attention_unet() -> nn.Module:
    levels = AttentionLevel(4, AttentionLevel(8, conv(16, 16)))
    return nn.Sequential(conv(3, 4), levels, nn.Conv2d(4, 2, 1))


class SelectiveFusion(nn.Module):
    """GLPN's fusion of a local and a global map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(2 * channels, channels), conv(channels, channels)
        self.score = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, local: Tensor, wide: Tensor) -> Tensor:
        scores = self.score(self.second(self.first(torch.cat([local, wide], 1)))).sigmoid()
        return local * scores[:, 0, :, :].unsqueeze(1) + wide * scores[:, 1, :, :].unsqueeze(1)


class Glpn(nn.Module):
    """A depth network: what is deeper comes from the very map that it is fused with."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = conv(3, 4), conv(4, 4)
        self.stage3 = conv(4, 4)
        self.fusion2, self.fusion1 = SelectiveFusion(4), SelectiveFusion(4)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.stage1(x)
        two = self.stage2(F.avg_pool2d(one, 2))
        three = self.stage3(F.avg_pool2d(two, 2))
        y = self.fusion2(two, F.interpolate(three, scale_factor=2.0))
        y = self.fusion1(one, F.interpolate(y, scale_factor=2.0))
        return self.head(y)


class MultiscaleFusion(nn.Module):
    """MAnet's decoder block: its factor is the sum of two squeezes, of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.deeper = conv(3, 8), conv(8, 8)
        self.high = conv(8, 8)
        self.se_high, self.se_low = self.squeeze(), self.squeeze()
        self.after = conv(16, 8)

    def squeeze(self) -> nn.Sequential:
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2, 8, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        up = F.interpolate(self.high(self.deeper(F.max_pool2d(skip, 2))), scale_factor=2.0)
        up = up * (self.se_high(up) + self.se_low(skip))
        return self.after(torch.cat([up, skip], 1))


class Separator(nn.Module):
    """ConvTasNet: a network that estimates the mask of what its encoder returns."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.mask = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        y = encoded
        for block in self.blocks:
            y = y + block(y.relu())
        return self.decoder(encoded * self.mask(y).sigmoid())


class RecurrentMask(nn.Module):
    """A mask that a recurrent layer estimates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.mask = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x).flatten(2).transpose(1, 2)
        return frames * self.mask(self.lstm(frames)[0]).sigmoid()


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        y = torch.sigmoid(x)
        return gradient * (y * (1 + x * (1 - y)))


class MemoryEfficientSwish(nn.Module):
    """An activation that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


class MBConv(nn.Module):
    """efficientnet_pytorch's block: its squeeze-and-excitation has no module of its own."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self._depthwise_conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self._bn1, self._bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self._se_reduce, self._se_expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self._project_conv = nn.Conv2d(8, 8, 1)
        self._swish = MemoryEfficientSwish()

    def forward(self, inputs: Tensor) -> Tensor:
        x = self._swish(self._bn1(self._depthwise_conv(inputs)))
        squeezed = self._se_expand(self._swish(self._se_reduce(F.adaptive_avg_pool2d(x, 1))))
        x = torch.sigmoid(squeezed) * x
        x = self._bn2(self._project_conv(x))
        if self.drop and len(x.shape) == 4:  # which torch.fx cannot trace, as in MONAI
            x = F.dropout2d(x, self.drop, self.training)
        return x + inputs


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "Attention U-Net": (
        attention_unet,
        {
            f"{level}.attention.{part}.0"
            for level in ("1", "1.deeper")
            for part in ("w_g", "w_x", "psi")
        },
    ),
    "GLPN": (
        Glpn,
        {
            f"{fusion}.{part}"
            for fusion in ("fusion1", "fusion2")
            for part in ("first.0", "second.0", "score")
        },
    ),
    "MAnet": (MultiscaleFusion, {"se_high.1", "se_high.3", "se_low.1", "se_low.3"}),
    "ConvTasNet": (Separator, set()),
    "mask of a recurrent layer": (RecurrentMask, set()),
    "EfficientNet": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), MBConv(), MBConv()),
        {f"{block}.{part}" for block in "12" for part in ("_se_reduce", "_se_expand")},
    ),
    "MONAI's EfficientNet": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), MBConv(0.1), MBConv(0.1)),
        {f"{block}.{part}" for block in "12" for part in ("_se_reduce", "_se_expand")},
    ),
}


@pytest.mark.parametrize("read_by", ["recorded", "symbolic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gates_are_told_from_the_network_they_stand_in(name: str, read_by: str) -> None:
    build, gates = NETWORKS[name]
    found = read(build(), torch.randn(2, 3, 16, 16) if read_by == "recorded" else None)
    assert found.read_by == read_by
    assert {layer.name for layer in found.layers if layer.gate is not None} == gates
