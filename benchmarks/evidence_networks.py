"""The small networks of the evidence."""

from __future__ import annotations

from functools import partial

import torch
from evidence_data import CLASSES
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

WIDTHS = (32, 64, 128)
PIXELS = 14


class ResNet(nn.Module):
    """A stem of stride 2 and a residual block for each width: maps of 7, 4 and 2 pixels."""

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 8)
        channels = widths[0]
        self.conv1 = nn.Conv2d(1, channels, 3, 2, padding=1, bias=False)
        self.bn1 = layer(channels)
        blocks = []
        for place, planes in enumerate(widths):
            stride = 2 if place else 1
            shortcut = None
            if stride != 1 or channels != planes:
                conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, layer(planes))
            blocks.append(BasicBlock(channels, planes, stride, shortcut, norm_layer=layer))
            channels = planes
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.bn1(self.conv1(images))))
        return self.fc(self.dropout(features.mean((2, 3))))


class MobileNet(nn.Module):
    """A stem, then depthwise 3x3 and pointwise convs in turn, as in MobileNetV1."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        channels = widths[0]
        layers = [*_normed(nn.Conv2d(1, channels, 3, padding=1, bias=False))]
        for place, planes in enumerate(widths):
            stride = 2 if place in (1, 2) else 1
            depthwise = nn.Conv2d(
                channels, channels, 3, stride, padding=1, groups=channels, bias=False
            )
            layers += [*_normed(depthwise), *_normed(nn.Conv2d(channels, planes, 1, bias=False))]
            channels = planes
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


class SignalNet(nn.Module):
    """Three 1-d convs of stride 2 with batch norm, and a linear layer: of MNIST-1D's own size."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, kernel in ((1, 5), (width, 3), (width, 3)):
            conv = nn.Conv1d(inputs, width, kernel, 2, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm1d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(5 * width, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        return self.fc(self.features(signals).flatten(1))


def _normed(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()


def mixer(width: int = 64, blocks: int = 2, dropout: float = 0.0, se: bool = False) -> nn.Module:
    """Timm's MLP-Mixer on 49 patches of 2x2 pixels."""
    model = MlpMixer(
        img_size=PIXELS,
        patch_size=2,
        in_chans=1,
        num_classes=CLASSES,
        num_blocks=blocks,
        embed_dim=width,
        mlp_ratio=(0.5, 2.0),
        proj_drop_rate=dropout,
    )
    # timm's zeros are nothing that standardization or MWE could act on.
    model.head.reset_parameters()
    if se:
        for block in model.blocks:
            block.mlp_channels = nn.Sequential(block.mlp_channels, TokenSE(width))
    return model


class TokenSE(nn.Module):
    """Squeeze and excitation of tokens ``[N, tokens, channels]``, with reduction 16."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 16)
        self.fc2 = nn.Linear(channels // 16, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(tokens.mean(1, keepdim=True)))
        return tokens * torch.sigmoid(self.fc2(hidden))
