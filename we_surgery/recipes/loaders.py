"""Datasets -> batches, by timm's loader where the task is classification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from we_surgery.recipes.layouts import open_dataset
from we_surgery.recipes.place import Place
from we_surgery.recipes.recipe import Recipe
from we_surgery.recipes.transforms import make_transform

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loaders:
    """The batches of one run, of this process."""

    train: Any
    validation: Any


def make_loaders(
    recipe: Recipe, folder: Path, batch_size: int, workers: int, place: Place
) -> Loaders:
    """Loaders over a data folder.

    Args:
        recipe: what is to be trained.
        folder: where its images lie.
        batch_size: of one step of this process.
        workers: processes that read images.
        place: where the batches go, and among how many processes the images are shared out.

    Raises:
        InputError: images are missing.
    """
    made = []
    for is_training in (True, False):
        dataset: Any = open_dataset(recipe.data, folder, is_training=is_training)
        # Whole images of a segmentation differ in size.
        whole_images = recipe.task == "segmentation" and not is_training
        shared: dict[str, Any] = {
            "batch_size": 1 if whole_images else batch_size,
            "num_workers": workers,
            "pin_memory": place.device.type == "cuda",
            # New ones each epoch, which begin from the epoch's seed.
            "persistent_workers": False,
        }
        if recipe.task == "classification":
            loader = create_loader(
                dataset,
                recipe.data.input_size,
                is_training=is_training,
                distributed=place.processes > 1,
                use_prefetcher=False,
                **shared,
            )
        else:
            sampler: Any = None
            if place.processes > 1:
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
