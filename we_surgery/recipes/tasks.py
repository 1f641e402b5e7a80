"""What a task asks of a network: its loss and its metrics."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from we_surgery.recipes.layouts import IGNORED_LABEL
from we_surgery.recipes.recipe import Task

_AUXILIARY_WEIGHT = 0.4


class Metric(Protocol):
    """Counts over batches, summed over processes by adding their ``counts``."""

    counts: Tensor

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Adds one batch."""

    def result(self) -> dict[str, float]:
        """The figures in percent; the first is the one that ranks checkpoints."""


class TopAccuracy:
    """``top1`` and ``top5`` of logits ``[N, classes]``; the latter for at least six classes."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.depths = (1, 5) if classes > 5 else (1,)
        # Right answers at each depth, then all.
        self.counts = torch.zeros(len(self.depths) + 1, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        hits = outputs.topk(self.depths[-1], dim=1).indices == labels.unsqueeze(1)
        for place, depth in enumerate(self.depths):
            self.counts[place] += hits[:, :depth].sum()
        self.counts[-1] += len(labels)

    def result(self) -> dict[str, float]:
        shares = (100 * self.counts[:-1] / self.counts[-1]).tolist()
        return {f"top{depth}": share for depth, share in zip(self.depths, shares, strict=True)}


class MeanIntersectionOverUnion:
    """``miou`` of logits ``[N, classes, H, W]``, over the classes that occur."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        counted = labels != IGNORED_LABEL
        pairs = labels[counted] * self.classes + outputs.argmax(1)[counted]
        found = torch.bincount(pairs, minlength=self.classes**2)
        self.counts += found.view(self.classes, self.classes)

    def result(self) -> dict[str, float]:
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return {"miou": (100 * hits / union)[union > 0].mean().item()}


def make_metric(task: Task, classes: int, device: torch.device) -> Metric:
    """A new metric for a task."""
    if task == "segmentation":
        return MeanIntersectionOverUnion(classes, device)
    return TopAccuracy(classes, device)


def loss_of(outputs: Tensor | dict[str, Tensor], labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy; an auxiliary output counts 0.4, as torchvision's references have it."""
    if not isinstance(outputs, dict):
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    losses = {
        name: F.cross_entropy(output, labels, ignore_index=IGNORED_LABEL, label_smoothing=smoothing)
        for name, output in outputs.items()
    }
    total = losses.pop("out")
    return total + _AUXILIARY_WEIGHT * sum(losses.values(), torch.zeros_like(total))


def main_output(outputs: Tensor | dict[str, Tensor]) -> Tensor:
    """The output that is evaluated."""
    return outputs["out"] if isinstance(outputs, dict) else outputs
