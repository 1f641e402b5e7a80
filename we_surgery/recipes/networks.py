"""The papers' networks that torchvision and timm do not have."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead


def resnet18_for_small_images(num_classes: int = 10) -> nn.Module:
    """ResNet18 for images of 32x32: a 3x3 stem of stride 1 and no pooling after it."""
    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet50_without_norm(num_classes: int = 1000) -> nn.Module:
    """ResNet50 with every norm left out (supplement, section 2); its convs have no bias."""
    model: nn.Module = torchvision.models.resnet50(num_classes=num_classes, norm_layer=_no_norm)
    return model


def resnet50_with_group_norm(num_classes: int = 1000, num_groups: int = 32) -> nn.Module:
    """ResNet50 with group normalization (WE paper, Table 4)."""
    norm = functools.partial(nn.GroupNorm, num_groups)
    model: nn.Module = torchvision.models.resnet50(num_classes=num_classes, norm_layer=norm)
    return model


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def vgg19_for_small_images(num_classes: int = 100) -> nn.Module:
    """VGG19 with batch normalization and one linear layer, for images of 32x32."""
    features = torchvision.models.vgg19_bn().features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, num_classes))


def deeplabv3_resnet50(num_classes: int = 21) -> nn.Module:
    """DeepLabv3 on ResNet50 with an output stride of 16; torchvision's has 8."""
    backbone = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    head = DeepLabHead(2048, num_classes, atrous_rates=(6, 12, 18))
    model: nn.Module = DeepLabV3(IntermediateLayerGetter(backbone, {"layer4": "out"}), head)
    return model


class ResNeXt29(nn.Module):
    """ResNeXt-29 for images of 32x32: three stages of three bottlenecks.

    Cardinality 16 and base width 64 give ``16x64d``, 68,247,460 parameters for 100 classes.
    """

    def __init__(self, cardinality: int = 16, base_width: int = 64, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, stages = 64, []
        for planes, stride in ((64, 1), (128, 2), (256, 2)):
            blocks = []
            for index in range(3):
                step = stride if index == 0 else 1
                out_channels = planes * Bottleneck.expansion
                shortcut = None
                if channels != out_channels:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, out_channels, 1, step, bias=False),
                        nn.BatchNorm2d(out_channels),
                    )
                blocks.append(Bottleneck(channels, planes, step, shortcut, cardinality, base_width))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class WideResNet(nn.Module):
    """A pre-activation wide residual network for images of 32x32 (``WRN-depth-width``).

    The depth is 6n + 4; 16 has two blocks per stage. Dropout is between the two convs of a block.
    """

    def __init__(
        self, depth: int = 16, width: int = 8, num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a wide residual network is 6n + 4, not {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for planes, stride in ((16, 1), (32, 2), (64, 2)):
            for index in range((depth - 4) // 6):
                step = stride if index == 0 else 1
                blocks.append(_PreActivationBlock(channels, planes * width, step, dropout))
                channels = planes * width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn(self.blocks(self.conv1(images))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class _PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        active = F.relu(self.bn1(features))
        kept = features if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return kept + residual


class TemporalShift(nn.Module):
    """Moves an eighth of the channels one frame back and an eighth one frame forth, then a layer.

    Temporal shift module (Lin et al.) of ``[N * T, C, H, W]``: ``out[t] = in[t + 1]`` for the first
    ``channels // fold_div`` channels, ``in[t - 1]`` for as many after them, zeros at the ends.
    """

    def __init__(self, net: nn.Module, n_segment: int, fold_div: int = 8) -> None:
        super().__init__()
        self.net = net
        self.n_segment = n_segment
        self.fold_div = fold_div

    def forward(self, features: Tensor) -> Tensor:
        clips = features.view(-1, self.n_segment, *features.shape[1:])
        fold = clips.shape[2] // self.fold_div
        back = F.pad(clips[:, 1:, :fold], (0, 0, 0, 0, 0, 0, 0, 1))
        forth = F.pad(clips[:, :-1, fold : 2 * fold], (0, 0, 0, 0, 0, 0, 1, 0))
        shifted = torch.cat([back, forth, clips[:, :, 2 * fold :]], dim=2).flatten(0, 1)
        result: Tensor = self.net(shifted)
        return result


class TSMResNet50(nn.Module):
    """ResNet50 over frames with a temporal shift inside each residual branch.

    It takes clips ``[N, C, T, H, W]`` and averages the logits of their frames.
    """

    def __init__(self, num_classes: int = 27, frames: int = 8) -> None:
        super().__init__()
        self.frames = frames
        self.backbone = torchvision.models.resnet50(num_classes=num_classes)
        for block in self.backbone.modules():
            if isinstance(block, Bottleneck):
                block.conv1 = TemporalShift(block.conv1, frames)

    def forward(self, clips: Tensor) -> Tensor:
        logits = self.backbone(clips.transpose(1, 2).flatten(0, 1))
        averaged: Tensor = logits.view(-1, self.frames, logits.shape[-1]).mean(1)
        return averaged
