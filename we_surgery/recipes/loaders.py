"""Datasets -> batches: what happens to an image, and timm's loader for classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from we_surgery.recipes.layouts import IGNORED_LABEL, open_dataset
from we_surgery.recipes.recipe import Data, Recipe, Task

Batches = Iterable[tuple[Tensor, Tensor]]

_SCALES = (0.5, 2.0)
_PADDING = 4


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a run."""

    device: torch.device
    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Loaders:
    """The batches of one run, of this process."""

    train: Any
    validation: Any


def make_loaders(
    recipe: Recipe, folder: Path, batch_size: int, workers: int, process: ProcessInfo
) -> Loaders:
    """Loaders over a data folder; ``batch_size`` is that of one step of this process."""
    made = []
    for is_training in (True, False):
        dataset: Any = open_dataset(recipe.data, folder, is_training=is_training)
        # Whole images of a segmentation differ in size.
        whole_images = recipe.task == "segmentation" and not is_training
        shared: dict[str, Any] = {
            "batch_size": 1 if whole_images else batch_size,
            "num_workers": workers,
            "pin_memory": process.device.type == "cuda",
            # New ones each epoch, which begin from the epoch's seed.
            "persistent_workers": False,
        }
        if recipe.task == "classification":
            loader = create_loader(
                dataset,
                recipe.data.input_size,
                is_training=is_training,
                distributed=process.processes > 1,
                use_prefetcher=False,
                **shared,
            )
        else:
            sampler: Any = None
            if process.processes > 1:
                kind = DistributedSampler if is_training else OrderedDistributedSampler
                sampler = kind(dataset)
            loader = DataLoader(
                dataset,
                shuffle=is_training and sampler is None,
                sampler=sampler,
                drop_last=is_training,
                **shared,
            )
        # After the loader, for timm's sets one of its own.
        dataset.transform = make_transform(recipe.data, recipe.task, is_training=is_training)
        made.append(loader)
    return Loaders(*made)


def synthetic_loaders(recipe: Recipe, batch_size: int, batches: int, seed: int) -> Loaders:
    """Random images and labels in place of a folder's, to try a recipe out."""
    generator = torch.Generator().manual_seed(seed)
    channels, *size = recipe.data.input_size
    shape = [channels, recipe.data.frames, *size] if recipe.task == "video" else [channels, *size]
    count = batches * batch_size
    images = torch.randn(count, *shape, generator=generator)
    label_shape = (count, *size) if recipe.task == "segmentation" else (count,)
    labels = torch.randint(recipe.data.classes, label_shape, generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size, drop_last=True)
    return Loaders(loader, loader)


def make_transform(data: Data, task: Task, *, is_training: bool) -> Callable[..., Any]:
    """The transform of one split: of an image, of an image and its mask, or of a clip."""
    if task == "classification" and data.crop in ("resized", "center"):
        # As the ImageNet recipes of the papers have it, from timm.
        transform: Callable[..., Any] = create_transform(
            data.input_size,
            is_training=is_training and data.crop == "resized",
            color_jitter=data.color_jitter or None,
            interpolation="bilinear",
            hflip=0.5 if data.flip else 0.0,
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
        )
        return transform
    size = list(data.input_size[1:])
    steps: list[Any] = [v2.ToImage()]
    if task == "segmentation":
        steps += _around_masks(data) if is_training else []  # whole images, one at a time
    elif is_training and data.crop == "padded":
        steps.append(v2.RandomCrop(size, padding=_PADDING))
    elif is_training:
        steps.append(v2.RandomResizedCrop(size, antialias=True))
    else:
        shorter = round(min(size) / data.crop_pct)
        steps += [v2.Resize(shorter, antialias=True), v2.CenterCrop(size)]
    if is_training and data.flip:
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToDtype({tv_tensors.Mask: torch.int64, "others": torch.float32}, scale=True)]
    steps += [v2.Normalize(list(data.mean), list(data.std)), v2.ToPureTensor()]
    if task == "video":
        steps.append(_frames_second)
    composed: Callable[..., Any] = v2.Compose(steps)
    return composed


def _around_masks(data: Data) -> list[Any]:
    size = list(data.input_size[1:])
    fill = {tv_tensors.Mask: IGNORED_LABEL, "others": 0}
    steps: list[Any] = [v2.RandomCrop(size, pad_if_needed=True, fill=fill)]
    if data.crop == "scaled":
        scale = v2.ScaleJitter(size, _SCALES, InterpolationMode.BILINEAR, antialias=True)
        steps.insert(0, scale)
    if data.color_jitter:
        steps.append(v2.ColorJitter(*3 * [data.color_jitter]))
    return steps


def _frames_second(clip: torch.Tensor) -> torch.Tensor:
    """``[T, C, H, W]`` -> ``[C, T, H, W]``, as torchvision's video networks take it."""
    return clip.transpose(0, 1).contiguous()
