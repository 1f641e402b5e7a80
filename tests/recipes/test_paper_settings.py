"""Settings that the papers give, as the recipes and their transforms have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors

import we_surgery as ws
from we_surgery.recipes import load_recipe
from we_surgery.recipes.loaders import make_transform
from we_surgery.recipes.recipe import Data, Training
from we_surgery.recipes.training_run import _parameters

CONFIGS = Path(__file__).parents[2] / "configs"


def test_gestures_are_not_mirrored_and_have_sixteen_frames() -> None:
    recipe = load_recipe(CONFIGS / "recipes/jester/tsm-resnet50.yaml")
    assert recipe.data.frames == recipe.model.arguments["frames"] == 16
    assert not recipe.data.flip
    transform = make_transform(recipe.data, recipe.task, is_training=True)
    assert "RandomHorizontalFlip" not in repr(transform)


@pytest.mark.parametrize("task", ["classification", "video"])
@pytest.mark.parametrize("crop", ["resized", "padded"])
@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_where_the_recipe_says_so(task: str, crop: str, flip: bool) -> None:
    settings = Data("frames", classes=2, crop=crop, flip=flip)
    transform = make_transform(settings, task, is_training=True)
    assert ("RandomHorizontalFlip" in repr(transform)) is flip


def test_crops_of_cityscapes_have_the_scale_of_the_image() -> None:
    recipe = load_recipe(CONFIGS / "recipes/cityscapes/deeplabv3-resnet50.yaml")
    transform = make_transform(recipe.data, recipe.task, is_training=True)
    columns = torch.arange(2048).expand(1, 1024, 2048) // 8
    mask = tv_tensors.Mask(columns.to(torch.uint8))
    _, cropped = transform(Image.new("RGB", (2048, 1024)), mask)
    assert cropped.shape[-2:] == (768, 768)
    assert len(cropped.unique()) in (96, 97)  # 768 / 8 columns, neither padded nor scaled


def test_a_backbone_may_learn_more_slowly() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    settings = Training(1, 1, {"lr": 0.1}, backbone_lr_scale=0.1)
    slow, usual = _parameters(model, settings)
    assert slow["lr"] == pytest.approx(0.01)
    assert slow["params"] == list(model["backbone"].parameters())
    assert usual["params"] == list(model["classifier"].parameters())


def test_a_network_that_norms_before_its_convs_is_standardized_too() -> None:
    recipe = load_recipe(CONFIGS / "recipes/cifar10/wrn-16-8-lwe-dst.yaml")
    assert recipe.surgery["standardize"] in ("on", True)


def test_the_thesis_curve_leaves_layers_without_a_norm_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    plan = ws.plan(model, config=CONFIGS / "thesis-curve.yaml")
    assert [bool(decision.stages) for decision in plan.decisions] == [True, False]
