"""Folders of images in their usual layouts -> datasets; what is missing is one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from we_surgery.errors import InputError
from we_surgery.recipes.recipe import Data

Example = tuple[Any, Any]
Examples = Dataset[Example]

IGNORED_LABEL = 255
"""Pixels that count for neither the loss nor the metric."""


def open_dataset(data: Data, folder: Path, *, is_training: bool) -> Examples:
    """The split that is trained on or evaluated, its ``transform`` still to be set."""
    split = data.train if is_training else data.validation
    opener = _OPENERS[data.layout]
    try:
        dataset = opener(data, folder, split, is_training)
    except (OSError, RuntimeError, ValueError) as error:
        raise _missing(data, folder, split, str(error).partition("\n")[0]) from error
    if not len(dataset):  # type: ignore[arg-type]
        raise _missing(data, folder, split, "it holds no image")
    return dataset


EXPECTED = {
    "imagefolder": "{split}/CLASS/IMAGE.jpg, one folder a class",
    "cifar10": "cifar-10-batches-py/ (unpacked from cifar-10-python.tar.gz)",
    "cifar100": "cifar-100-python/ (unpacked from cifar-100-python.tar.gz)",
    "tiny-imagenet": "train/CLASS/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt",
    "voc": "VOCdevkit/VOC2012/ with JPEGImages, ImageSets/Segmentation/{split}.txt and "
    "SegmentationClass (SegmentationClassAug for trainaug)",
    "cityscapes": "leftImg8bit/{split}/CITY/*.png and gtFine/{split}/CITY/*_labelIds.png",
    "frames": "{split}.txt with a line `VIDEO LABEL` each, and VIDEO/*.jpg, one image a frame",
}
"""What each layout expects below the data folder."""


def _missing(data: Data, folder: Path, split: str, why: str) -> InputError:
    return InputError(
        f"the images of the split {split!r} cannot be opened in {folder}: {why}",
        f"Put them there as {EXPECTED[data.layout].format(split=split)}.",
    )


class Pictures(Dataset[Example]):
    """Image files and their labels, each a number or an image of labels.

    ``label_of`` maps the colours of a label image to classes, ``[256]``.
    """

    def __init__(
        self, files: list[tuple[Path, int | Path]], label_of: Tensor | None = None
    ) -> None:
        self.files = files
        self.label_of = label_of
        self.transform: Callable[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file, label = self.files[index]
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if isinstance(label, int):
            return (image if self.transform is None else self.transform(image)), label
        with Image.open(label) as opened:
            values = torch.from_numpy(np.array(opened, dtype=np.int64))
        mask = tv_tensors.Mask(values if self.label_of is None else self.label_of[values])
        return (image, mask) if self.transform is None else self.transform(image, mask)


class Clips(Dataset[Example]):
    """Videos as folders of frames; clips begin at random places, or in the middle."""

    def __init__(
        self, videos: list[tuple[Path, int]], frames: int, sampling: str, at_random: bool
    ) -> None:
        self.videos = videos
        self.frames = frames
        self.sampling = sampling
        self.at_random = at_random
        self.transform: Callable[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Example:
        folder, label = self.videos[index]
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png"))
        if not files:
            raise InputError(f"the video {folder} has no frames", "Put its frames there as *.jpg.")
        images = []
        for position in self._positions(len(files)):
            with Image.open(files[position]) as opened:
                images.append(tv_tensors.Image(opened.convert("RGB")))
        clip = tv_tensors.Video(torch.stack(images))
        return (clip if self.transform is None else self.transform(clip)), label

    def _positions(self, available: int) -> list[int]:
        if self.sampling == "dense":
            latest = max(available - self.frames, 0)
            start = self._draw(latest + 1) if self.at_random else latest // 2
            return [(start + step) % available for step in range(self.frames)]
        part = available / self.frames
        width = max(int(part), 1)
        starts = [int(index * part) for index in range(self.frames)]
        within = [self._draw(width) if self.at_random else width // 2 for _ in starts]
        return [min(sum(pair), available - 1) for pair in zip(starts, within, strict=True)]

    @staticmethod
    def _draw(below: int) -> int:
        return int(torch.randint(below, ()))


def _image_folder(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    opened: Examples = torchvision.datasets.ImageFolder(folder / split)
    return opened


def _cifar(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    kinds = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    opened: Examples = kinds[data.layout](folder, train=is_training)
    return opened


def _tiny_imagenet(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    numbers = {name: number for number, name in enumerate(classes)}
    files: list[tuple[Path, int | Path]] = []
    if is_training:
        for name in classes:
            images = sorted((folder / split / name / "images").iterdir())
            files += [(image, numbers[name]) for image in images]
    else:
        lines = (folder / split / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        for line in lines:
            image, name = line.split()[:2]
            files.append((folder / split / "images" / image, numbers[name]))
    return Pictures(files)


def _voc(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    root = folder / "VOCdevkit" / "VOC2012"
    masks = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = listed.read_text(encoding="utf-8").split()
    return Pictures([(root / "JPEGImages" / f"{n}.jpg", masks / f"{n}.png") for n in names])


def _cityscapes(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    found = torchvision.datasets.Cityscapes(folder, split=split, target_type="semantic")
    label_of = torch.full((256,), IGNORED_LABEL)
    for label in found.classes:
        if 0 <= label.train_id < IGNORED_LABEL:
            label_of[label.id] = label.train_id
    pairs = zip(found.images, found.targets, strict=True)
    return Pictures([(Path(image), Path(target[0])) for image, target in pairs], label_of)


def _frames(data: Data, folder: Path, split: str, is_training: bool) -> Examples:
    lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line.strip()]
    videos = [(folder / first, int(rest[-1])) for first, *rest in words]
    return Clips(videos, data.frames, data.sampling, at_random=is_training)


_OPENERS: dict[str, Callable[[Data, Path, str, bool], Examples]] = {
    "imagefolder": _image_folder,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny-imagenet": _tiny_imagenet,
    "voc": _voc,
    "cityscapes": _cityscapes,
    "frames": _frames,
}
