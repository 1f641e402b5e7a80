"""segmentation-models-pytorch: each decoder on encoders of different makers."""

from __future__ import annotations

from collections.abc import Iterator

import segmentation_models_pytorch as smp
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import noise, on

_DECODERS = (
    "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer DPT"
).split()
_ENCODERS = (
    "resnet18 mobilenet_v2 efficientnet-b0 mit_b0 mobileone_s0 timm-skresnet18 dpn68 densenet121 "
    "tu-regnety_002 tu-mobilenetv3_small_050 tu-convnext_atto timm-tf_efficientnet_lite0 vgg11_bn"
).split()
_TRANSFORMER = "tu-vit_tiny_patch16_224"  # all that DPT takes


def names() -> list[str]:
    """``Unet/resnet18`` and so on."""
    pairs = [f"{decoder}/{encoder}" for decoder in _DECODERS[:-1] for encoder in _ENCODERS]
    return [*pairs, f"DPT/{_TRANSFORMER}"]


def build(name: str) -> nn.Module:
    """The decoder on its encoder, for three classes."""
    decoder, _, encoder = name.partition("/")
    model: nn.Module = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3)
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Two pictures."""
    for size in (64, 128, 224):
        yield on(noise(2, 3, size, size))
