"""pytorchcv: the smallest network of each family, for ImageNet, CIFAR-10 and dense prediction."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytorchcv.model_provider import _models, get_model
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import noise, on

_COPIES = ("_cifar100", "_svhn", "_cub", "_coco", "_ade20k", "_voc")
"""The same networks for other numbers of classes."""


def names() -> list[str]:
    """The first name of each family, which is the smallest network in it."""
    families: dict[str, str] = {}
    for name in _models:
        if not name.endswith(_COPIES) or name.startswith(("centernet", "simplepose")):
            family = re.sub(r"\d+.*?(_|$)", r"\1", name) + re.sub(r".*(_cifar10)?$", r"\1", name)
            families.setdefault(family, name)
    return list(families.values())


def build(name: str) -> nn.Module:
    """The network, without weights."""
    model: nn.Module = get_model(name, pretrained=False)
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Pictures of 64 points, and of the size the network is made for."""
    channels = getattr(model, "in_channels", 3)
    own = getattr(model, "in_size", None) or (224, 224)
    if name.startswith("raft"):
        yield on(noise(1, 3, 128, 128), noise(1, 3, 128, 128))
    if len(own) == 1:
        yield on(noise(2, channels, 128))
    if len(own) == 2:
        yield from (on(noise(2, channels, size, size)) for size in (64, 128) if size < own[-1])
        yield on(noise(2, channels, *own))
