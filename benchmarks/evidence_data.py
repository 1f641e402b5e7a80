"""Fashion-MNIST, pooled to 14 pixels, and the batches of a run."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package lays the files."""
HOW_TO_GET = """Fashion-MNIST was not found in {folder}. Two ways to get it:
  apt-get install dataset-fashion-mnist      # into /usr/share/datasets/fashion-mnist
  python -c "import torchvision; torchvision.datasets.FashionMNIST('DIR', download=True)"
then pass the folder as --data."""

CLASSES = 10
VALIDATION = 10_000
"""The last training images: they choose learning rate and decay, and are never trained on."""
CURVE = 2_000
"""Validation images of the curves, and training images of the training accuracy."""
_MEAN, _DEVIATION = 0.286, 0.320


@dataclass(frozen=True)
class Split:
    """Images ``[N, 1, H, W]``, normalized, and labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor | slice) -> Split:
        """Some of the images."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """What a run may train on, what chooses its settings, and what is reported."""

    pool: Split
    validation: Split
    test: Split


def load(folder: Path = FOLDER) -> Data:
    """The data set of a folder that holds the four IDX files, gzipped or not, at any depth."""
    train, test = _split(folder, "train"), _split(folder, "t10k")
    return Data(train.part(slice(0, -VALIDATION)), train.part(slice(-VALIDATION, None)), test)


def _split(folder: Path, name: str) -> Split:
    images = read_idx(_find(folder, f"{name}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{name}-labels-idx1-ubyte"))
    pooled = F.avg_pool2d(images.float().unsqueeze(1) / 255, 2)
    return Split((pooled - _MEAN) / _DEVIATION, labels.long())


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz"):
        for path in sorted(folder.rglob(name + suffix)):
            return path
    raise SystemExit(HOW_TO_GET.format(folder=folder))


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, in its shape."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zero, kind, dimensions = struct.unpack(">HBB", content[:4])
    if zero != 0 or kind != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


def draw(pool: Split, count: int, seed: int, classes: int = CLASSES) -> Split:
    """Random images of a pool, of the first ``classes`` classes."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    order = order[pool.labels[order] < classes]
    return pool.part(order[:count])


def batches(
    images: Split, size: int, steps: int, seed: int, *, mirror: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order in each epoch, without an incomplete last one."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(size)[: len(images) // size]:
            if done == steps:
                return
            batch = images.images[index]
            yield mirrored(batch, generator) if mirror else batch, images.labels[index]
            done += 1


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right, half of the time."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)
