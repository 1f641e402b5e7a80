"""Ultralytics: the network of each of its YAML files, at its smallest scale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ultralytics
from torch import nn
from ultralytics.nn import tasks
from zoo_models import Candidate

from zoo_libraries.filling import noise, on

_FOLDER = Path(ultralytics.__file__).parent / "cfg" / "models"
_KINDS = {
    "-cls": "ClassificationModel",
    "-seg": "SegmentationModel",
    "-pose": "PoseModel",
    "-obb": "OBBModel",
    "rtdetr": "RTDETRDetectionModel",
    "world": "WorldModel",
}


def names() -> list[str]:
    """The files' names, without those of which there are larger ones only."""
    return sorted({path.stem for path in _FOLDER.rglob("*.yaml")})


def build(name: str) -> nn.Module:
    """The network that the file describes."""
    kind = next((kind for word, kind in _KINDS.items() if word in name), "DetectionModel")
    model: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Two pictures."""
    for size in (64, 128, 256):
        yield on(noise(2, 3, size, size), chooses="rtdetr" in name or "26" in name)
