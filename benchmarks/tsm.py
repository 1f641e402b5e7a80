"""TSM-ResNet50 (Lin et al., ICCV 2019): a network whose convs are fed by shifts along time."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn


class Displace(nn.Module):
    """TSM's movement before ``net``, under names that give nothing away.

    An eighth of the channels comes from the next frame, an eighth from the one before; where
    there is none, zeros.

    Args:
        net: what the moved map is fed to.
        segments: frames a clip.
        in_place: write into a clone of the map instead of an empty tensor.
    """

    def __init__(self, net: nn.Module, segments: int, *, in_place: bool = False) -> None:
        super().__init__()
        self.net = net
        self.segments = segments
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        """``[clips * segments, C, H, W]`` to what ``net`` makes of it."""
        nt, c, h, w = x.shape
        x = x.view(nt // self.segments, self.segments, c, h, w)
        fold = c // 8
        out = x.clone() if self.in_place else torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, -1, :fold] = 0
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, 0, fold : 2 * fold] = 0
        if not self.in_place:
            out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        moved: Tensor = self.net(out.view(nt, c, h, w))
        return moved


def tsm_resnet50(variant: str = "residual", segments: int = 8) -> nn.Module:
    """The network on the default device.

    Args:
        variant: ``residual`` and ``in place`` feed each block's first conv; ``block`` the
            identity path as well.
        segments: frames a clip.
    """
    model = torchvision.models.resnet50()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for index, block in enumerate(stage):
            if variant == "block":
                stage[index] = Displace(block, segments)
            else:
                block.conv1 = Displace(block.conv1, segments, in_place=variant == "in place")
    return model
