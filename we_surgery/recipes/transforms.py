"""What happens to an image before the network sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import create_transform
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from we_surgery.recipes.layouts import IGNORED_LABEL
from we_surgery.recipes.recipe import Data, Task

_SCALES = (0.5, 2.0)
_PADDING = 4


def make_transform(data: Data, task: Task, *, is_training: bool) -> Callable[..., Any]:
    """The transform of one split: of an image, of an image and its mask, or of a clip."""
    if task == "classification" and data.crop in ("resized", "center"):
        # As the ImageNet recipes of the papers have it, from timm.
        transform: Callable[..., Any] = create_transform(
            data.input_size,
            is_training=is_training and data.crop == "resized",
            color_jitter=data.color_jitter or None,
            interpolation="bilinear",
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
        )
        return transform
    size = list(data.input_size[1:])
    steps: list[Any] = [v2.ToImage()]
    if task == "segmentation":
        steps += _around_masks(size, is_training)
    elif is_training and data.crop == "padded":
        steps += [v2.RandomCrop(size, padding=_PADDING), v2.RandomHorizontalFlip()]
    elif is_training:
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        shorter = round(min(size) / data.crop_pct)
        steps += [v2.Resize(shorter, antialias=True), v2.CenterCrop(size)]
    steps += [v2.ToDtype({tv_tensors.Mask: torch.int64, "others": torch.float32}, scale=True)]
    steps += [v2.Normalize(list(data.mean), list(data.std)), v2.ToPureTensor()]
    if task == "video":
        steps.append(_frames_second)
    composed: Callable[..., Any] = v2.Compose(steps)
    return composed


def _around_masks(size: list[int], is_training: bool) -> list[Any]:
    if not is_training:
        return []  # whole images, one at a time
    fill = {tv_tensors.Mask: IGNORED_LABEL, "others": 0}
    return [
        v2.RandomHorizontalFlip(),
        v2.ScaleJitter(size, _SCALES, InterpolationMode.BILINEAR, antialias=True),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
    ]


def _frames_second(clip: torch.Tensor) -> torch.Tensor:
    """``[T, C, H, W]`` -> ``[C, T, H, W]``, as torchvision's video networks take it."""
    return clip.transpose(0, 1).contiguous()
