"""The two image tasks of the evidence: real digits, few and noisy; and drawn strokes, many.

**digits**: the 1,797 real 8x8 digits that scikit-learn ships; 300 of them are trained on. Each
training batch is shifted by at most one pixel and gets Gaussian noise of 0.3; so is the test set,
once.

**strokes**: 100 classes of 16x16 grey images, 50,000 to train on and 10,000 to test, drawn by
this file. A class is an arrangement of four line segments whose ends are uniform in the middle
of the unit square. An image is its class turned by at most 0.2 rad, scaled by 0.85 to 1.15 and
moved by at most 0.06, each end moved by a Gaussian of 0.02, with a segment that belongs to no
class, under Gaussian noise of 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

_NOISE = 0.3
_STROKES = 4
_DISTRACTORS = 1
_CHUNK = 2000


@dataclass(frozen=True)
class Task:
    """Images ``[N, 1, H, W]`` and labels, and how long to train.

    Attributes:
        augment: whether training batches are shifted and get noise.
    """

    name: str
    classes: int
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    epochs: int
    batch_size: int
    augment: bool

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All training batches, the same for every method of a seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.images), generator=generator)
            for batch in order.split(self.batch_size):
                if len(batch) == self.batch_size:
                    images = self.images[batch]
                    yield (
                        disturbed(images, generator) if self.augment else images,
                        self.labels[batch],
                    )

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.epochs * (len(self.images) // self.batch_size)


def make_task(name: str, images: int | None = None) -> Task:
    """``digits`` or ``strokes``; ``images`` makes the latter smaller, to try things out."""
    return _digits() if name == "digits" else _strokes(images or 50_000)


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by at most one pixel, with noise."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    size = images.shape[-1]
    shifts = torch.randint(3, (2,), generator=generator).tolist()
    moved = padded[..., shifts[0] : shifts[0] + size, shifts[1] : shifts[1] + size]
    return moved + _NOISE * torch.randn(images.shape, generator=generator)


def _digits() -> Task:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:300], order[300:]
    test_images = torch.cat([disturbed(image[None], generator) for image in images[test]])
    return Task(
        "digits", 10, images[train], labels[train], test_images, labels[test], 40, 50, augment=True
    )


def _strokes(count: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    classes = 0.2 + 0.6 * torch.rand(100, _STROKES, 2, 2, generator=generator)
    parts = []
    for size in (count, count // 5):
        labels = torch.arange(size) % len(classes)
        chunks = [draw(classes[part], 16, generator) for part in labels.split(_CHUNK)]
        parts += [torch.cat(chunks), labels]
    return Task("strokes", 100, *parts, epochs=4, batch_size=128, augment=False)


def draw(strokes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Images ``[N, 1, size, size]`` of line segments ``[N, strokes, 2 ends, 2 coordinates]``."""
    count = len(strokes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.15)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 1, 2, 2)
    ends = strokes + 0.02 * torch.randn(strokes.shape, generator=generator)
    ends = (ends - 0.5) @ (turn * scale.view(-1, 1, 1, 1)) + 0.5 + uniform(-0.06, 0.06, 1, 1, 2)
    ends = torch.cat([ends, uniform(0, 1, _DISTRACTORS, 2, 2)], 1)

    grid = (torch.arange(size) + 0.5) / size
    points = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 2)
    start, way = ends[:, :, None, 0], ends[:, :, None, 1] - ends[:, :, None, 0]
    # The nearest point of a segment to a pixel: its projection, held within the ends.
    along = ((points - start) * way).sum(-1) / way.square().sum(-1).clamp_min(1e-6)
    nearest = start + along.clamp(0, 1).unsqueeze(-1) * way
    distance = (points - nearest).norm(dim=-1)
    width = uniform(0.03, 0.05, 1, 1)
    ink = torch.exp(-((distance / width) ** 2)).amax(1)
    return (ink + _NOISE * torch.randn(ink.shape, generator=generator)).view(count, 1, size, size)


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t."""
    from scipy.stats import t

    values = torch.tensor(differences, dtype=torch.float64)
    spread = values.std().item() / math.sqrt(len(differences))
    return values.mean().item(), float(t.ppf(0.975, len(differences) - 1)) * spread
