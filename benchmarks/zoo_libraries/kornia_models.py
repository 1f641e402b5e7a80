"""kornia: its networks for local features, detection and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from kornia import feature
from kornia.models import dexined, rrdbnet, small_sr, tiny_vit, yunet
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import noise, on


def _dedode() -> Any:
    return feature.DeDoDe(descriptor_model="B", amp_dtype=torch.float32)


_PATCHES = noise(4, 1, 32, 32)
_PICTURE = noise(1, 3, 64, 64)
_MODELS: dict[str, tuple[Any, ...]] = {
    "HardNet": (partial(feature.HardNet, pretrained=False), _PATCHES),
    "HardNet8": (partial(feature.HardNet8, pretrained=False), _PATCHES),
    "HyNet": (partial(feature.HyNet, pretrained=False), _PATCHES),
    "SOSNet": (partial(feature.SOSNet, pretrained=False), _PATCHES),
    "TFeat": (partial(feature.TFeat, pretrained=False), _PATCHES),
    "OriNet": (partial(feature.OriNet, pretrained=False), _PATCHES),
    "LAFAffNetShapeEstimator": (
        lambda: feature.LAFAffNetShapeEstimator(pretrained=False).features,
        _PATCHES,
    ),
    "KeyNet": (partial(feature.KeyNet, pretrained=False), noise(1, 1, 64, 64)),
    "DISK": (lambda: feature.DISK().unet, _PICTURE),
    "DeDoDe-detector": (lambda: _dedode().detector, _PICTURE),
    "DeDoDe-descriptor": (lambda: _dedode().descriptor, _PICTURE),
    "DeFMO": (partial(feature.DeFMO, pretrained=False), noise(1, 6, 64, 64)),
    "XFeatModel": (feature.XFeatModel, noise(1, 3, 64, 64)),
    "DexiNed": (lambda: dexined.DexiNed(pretrained=False), _PICTURE),
    "RRDBNet": (lambda: rrdbnet.RRDBNet(3, 3, num_feat=8, num_block=2, num_grow_ch=4), _PICTURE),
    "TinyViT": (lambda: tiny_vit.TinyViT.from_config("5m", img_size=64), noise(2, 3, 64, 64)),
    "YuNet": (lambda: yunet.YuNet("test", pretrained=False), noise(2, 3, 64, 64)),
    "SmallSRNet": (lambda: small_sr.SmallSRNet(2, pretrained=False), noise(1, 1, 32, 32)),
}


def names() -> list[str]:
    """All that are listed here."""
    return list(_MODELS)


def build(name: str) -> nn.Module:
    """The network, without weights."""
    model: nn.Module = _MODELS[name][0]()
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """What it is listed with."""
    yield on(*_MODELS[name][1:])
