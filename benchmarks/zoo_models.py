"""The zoo's models: built with random weights, and the inputs they run on.

A name says where the model comes from: ``torchvision:resnet18``, ``timm:resnet18``, or, for the
libraries of ``zoo_libraries``, ``monai:UNet-2d`` and so on. Nothing is downloaded. Inputs are as
small as each builder allows, because what is measured is the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import segmentation, video
from zoo_libraries import LIBRARIES, library

SIZES = (64, 128)
"""Picture sizes that are tried before a model's own."""
_BATCH = 2  # one picture alone cannot be normalized over the batch once its map is 1x1
_TORCHVISION_SIZE = 224
_DETECTION_SIZE = 96
_FLOW_SIZE = 128

# What a family of torchvision's builders takes besides the weights, by the beginning of its name.
# Detectors of random weights are sure of nothing, so their thresholds go down to 0 or,
# where a score of 0 must pass too, below.
_BOXES = {"min_size": _DETECTION_SIZE, "max_size": _DETECTION_SIZE}
_OPTIONS: dict[str, dict[str, Any]] = {
    "fasterrcnn": {"weights_backbone": None, "box_score_thresh": 0.0, **_BOXES},
    "maskrcnn": {"weights_backbone": None, "box_score_thresh": 0.0, **_BOXES},
    "keypointrcnn": {"weights_backbone": None, "box_score_thresh": 0.0, **_BOXES},
    "retinanet": {"weights_backbone": None, "score_thresh": -1.0, **_BOXES},
    "fcos": {"weights_backbone": None, "score_thresh": -1.0, **_BOXES},
    "ssd300": {"weights_backbone": None, "score_thresh": 0.0},
    "ssdlite320": {"weights_backbone": None, "score_thresh": 0.0},
    "deeplabv3": {"weights_backbone": None},
    "fcn": {"weights_backbone": None},
    "lraspp": {"weights_backbone": None},
    "googlenet": {"init_weights": False, "aux_logits": True},
    "inception_v3": {"init_weights": False},
    # The window is read from the picture, so a small picture keeps the network's shape.
    "vit_h_14": {"image_size": 56},
    "vit_": {"image_size": 64},
}
_FRAMES = {"s3d": 16, "mvit": 16}


@dataclass(frozen=True)
class Candidate:
    """Inputs that a model may run on.

    Attributes:
        inputs: as the model's forward takes them.
        shape: of the first picture or clip, for the table.
        chooses: the model returns what it chose by scores that with random weights are all but
            equal, such as boxes: the last digit of one decides which are returned.
    """

    inputs: Any
    shape: tuple[int, ...]
    chooses: bool = False


def build(name: str) -> nn.Module:
    """The model, seeded, on the CPU."""
    torch.manual_seed(0)
    return wake(build_bare(name))


def build_bare(name: str) -> nn.Module:
    """The model as its builder makes it, on the device that is the default one."""
    source, _, builder = name.partition(":")
    if source in LIBRARIES:
        model: nn.Module = library(source).build(builder)
    elif source == "timm":
        model = timm.create_model(builder)
    else:
        options = _matching(_OPTIONS, builder, {})
        model = torchvision.models.get_model(builder, weights=None, **options)
    return model


def wake(model: nn.Module) -> nn.Module:
    """Gives parameters that start out constant, or nearly so, values that let signals through.

    Zero heads, zero residual scales and layer scales of 1e-6 would hide what a layer computes.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.is_floating_point():
                spread = float(parameter.max() - parameter.min())
                if spread == 0:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif spread < 0.01:
                    parameter.normal_(std=0.02)
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Inputs to try, the smallest first."""
    source, _, builder = name.partition(":")
    if source in LIBRARIES:
        yield from library(source).candidates(builder, model)
    elif source == "timm":
        yield from _timm_pictures(model)
    elif builder in torchvision.models.list_models(module=torchvision.models.detection):
        yield _detection(builder)
    elif builder in torchvision.models.list_models(module=torchvision.models.optical_flow):
        pair = [_picture(3, _FLOW_SIZE) for _ in range(2)]
        inputs = {"image1": pair[0], "image2": pair[1], "num_flow_updates": 2}
        yield Candidate(inputs, tuple(pair[0].shape))
    elif builder in torchvision.models.list_models(module=video):
        frames = _matching(_FRAMES, builder, 8)
        for size in (*SIZES, _TORCHVISION_SIZE):
            clips = 1 if size == _TORCHVISION_SIZE else _BATCH
            clip = torch.randn(clips, 3, frames, size, size, generator=seeded())
            yield Candidate(clip, tuple(clip.shape))
    elif builder in torchvision.models.list_models(module=segmentation):
        yield _single(_picture(3, 64))
    elif builder.startswith("vit_"):
        yield _single(_picture(3, int(_matching(_OPTIONS, builder, {})["image_size"])))
    else:
        for size in (*SIZES, _TORCHVISION_SIZE, 299):
            yield _single(_picture(3, size))


def _timm_pictures(model: nn.Module) -> Iterator[Candidate]:
    settings: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, *own = settings["input_size"]
    smaller = () if settings.get("fixed_input_size") else SIZES
    for size in (*(s for s in smaller if s < own[-1]), own[-1]):
        yield _single(_picture(channels, size))


def _single(picture: Tensor) -> Candidate:
    return Candidate(picture, tuple(picture.shape))


def _picture(channels: int, size: int) -> Tensor:
    return torch.randn(_BATCH, channels, size, size, generator=seeded())


def _detection(builder: str) -> Candidate:
    """Pictures and targets, which the training mode asks for."""
    size = _DETECTION_SIZE
    images = list(torch.rand(_BATCH, 3, size, size, generator=seeded()))
    targets: list[dict[str, Tensor]] = []
    for _ in images:
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 56.0, 64.0], [30.0, 20.0, 90.0, 80.0]]),
            "labels": torch.tensor([1, 1]),
        }
        if builder.startswith("maskrcnn"):
            target["masks"] = torch.ones(2, size, size, dtype=torch.uint8)
        if builder.startswith("keypointrcnn"):
            target["keypoints"] = torch.tensor([40.0, 40.0, 1.0]).repeat(2, 17, 1)
        targets.append(target)
    return Candidate((images, targets), (_BATCH, 3, size, size), chooses=True)


def seeded() -> torch.Generator:
    """A generator whose numbers are the same each time."""
    return torch.Generator().manual_seed(0)


def _matching(table: Mapping[str, Any], builder: str, default: Any) -> Any:
    return next((value for start, value in table.items() if builder.startswith(start)), default)
