"""The networks, methods and conditions of the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import we_surgery as ws

METHODS: dict[str, Mapping[str, Any] | None] = {
    "plain": None,
    "lwe": {"mode": "lwe", "linear": "skip"},
    "mwe": {"mode": "mwe", "linear": "skip"},
    "we": {"mode": "we"},
    "lwe+mwe": {"mode": "lwe+mwe", "linear": "skip"},
    "se": {"mode": "lwe", "conv": "skip", "linear": "skip", "transplants": ["se"]},
    "standardize": {"mode": "lwe", "conv": "standardize", "linear": "skip"},
}
"""Configs by method. `we` is `lwe` with MWE on the linear layer; the networks have no depthwise
convs."""

WITHOUT_NORM: dict[str, Mapping[str, Any] | None] = {
    "plain": None,
    "lwe": {"mode": "lwe", "linear": "skip"},
    "lwe, scaled standardization": {"mode": "lwe", "conv": "weight_align+lwe", "linear": "skip"},
    "scaled standardization": {"mode": "lwe", "conv": "weight_align", "linear": "skip"},
    "mwe": {"mode": "mwe", "linear": "skip"},
}
"""Without a norm nothing is standardized unless it is scaled by the fan-in as well."""


@dataclass(frozen=True)
class Condition:
    """How the network is normalized and trained."""

    norm: str = "batch"
    optimizer: str = "sgd"
    lr: float = 0.05

    @property
    def methods(self) -> Mapping[str, Mapping[str, Any] | None]:
        """The methods that are compared under it."""
        return WITHOUT_NORM if self.norm == "none" else METHODS

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Everything decayed, as in the WE paper."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.05)
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)


CONDITIONS = {
    "SGD, 0.05": Condition(),
    "SGD, 0.015": Condition(lr=0.015),
    "SGD, 0.15": Condition(lr=0.15),
    "AdamW, 0.002": Condition(optimizer="adamw", lr=0.002),
    "group norm": Condition(norm="group"),
    "no norm": Condition(norm="none", lr=0.015),
    "no norm, AdamW": Condition(norm="none", optimizer="adamw", lr=0.002),
}


class SmallResNet(nn.Module):
    """A stem and three residual blocks of ``width``, twice and four times as many channels."""

    def __init__(self, classes: int, width: int, norm: str) -> None:
        super().__init__()
        layer = {
            "batch": nn.BatchNorm2d,
            "group": partial(nn.GroupNorm, 4),
            "none": lambda channels: nn.Identity(),
        }[norm]
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = layer(width)
        blocks, channels = [], width
        for planes, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            shortcut = None
            if channels != planes:
                conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, layer(planes))
            blocks.append(BasicBlock(channels, planes, stride, shortcut, norm_layer=layer))
            channels = planes
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.bn1(self.conv1(images))))
        return self.fc(features.mean((2, 3)))


def build(method: str, condition: Condition, classes: int, width: int, seed: int) -> nn.Module:
    """A method's network; the weights of a seed are the same for all methods."""
    torch.manual_seed(seed)
    model = SmallResNet(classes, width, condition.norm)
    config = condition.methods[method]
    return model if config is None else ws.convert(model, config=config, inplace=True)
