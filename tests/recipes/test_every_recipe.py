"""Each recipe of configs/ is sound, on tensors without memory; one of each task runs."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from we_surgery.checkpoint import Architecture
from we_surgery.planning.config import make_policy
from we_surgery.planning.decide import plan
from we_surgery.recipes import load_recipe, run_recipe
from we_surgery.recipes.loaders import ProcessInfo
from we_surgery.recipes.training_run import TrainingRun

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
EXPERIMENTS = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in RECIPES.rglob("*.yaml")
    if not path.stem.endswith("base")
)
ALL = {name: load_recipe(RECIPES / name) for name in EXPERIMENTS}
# Deep networks last: the first recipe with a surgery stands for all that have it.
SURGERIES = {
    str(ALL[name].surgery): name
    for name in sorted(EXPERIMENTS, key=lambda name: "152" in name, reverse=True)
    if ALL[name].surgery is not None
}


def test_there_are_recipes():
    assert len(EXPERIMENTS) > 90


@functools.cache
def network(name, arguments):
    with torch.device("meta"):
        return Architecture.parse(name, dict(arguments)).build()


def network_of(recipe):
    return network(recipe.model.name, tuple(recipe.model.arguments.items()))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_network_optimizer_and_schedule_are_made(name):
    recipe = ALL[name]
    assert recipe.form == ("converted" if recipe.training.sparsity else "attached")
    process = ProcessInfo(torch.device("cpu"))
    run = TrainingRun(recipe, network_of(recipe), None, process, 4, accumulation=1, seed=0)
    assert run.epochs >= recipe.training.epochs


@pytest.mark.parametrize("name", SURGERIES.values())
def test_the_surgery_fits_its_network(name):
    recipe = ALL[name]
    policy = make_policy(config=recipe.surgery)
    found = plan(network_of(recipe), config=recipe.surgery)
    assert bool(found.excited) == any(cell != "skip" for cell in policy.cells.values())
    put_in = {row.transplant for row in found.transplants if row.attach}
    assert put_in == {transplant.name for transplant in policy.transplants}


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("imagenet/resnet18-lwe-se.yaml", None),
        ("voc/deeplabv3-resnet50-lwe.yaml", "recipe_toys:TinySegmentation"),
        ("mini-kinetics/r3d-18-lwe.yaml", "recipe_toys:tiny_video_network"),
    ],
)
def test_a_recipe_of_each_task_runs_dry(name, network, tmp_path):
    recipe = ALL[name].replace(batch_size=2)
    size = (3, *(min(side, 32) for side in recipe.data.input_size[1:]))
    data = dataclasses.replace(recipe.data, input_size=size)
    if network is not None:
        model = Architecture(network, {"num_classes": recipe.data.classes})
        recipe = dataclasses.replace(recipe, model=model)
    recipe = dataclasses.replace(recipe, data=data)
    result = run_recipe(recipe, None, tmp_path / "run", dry_run=True)
    assert result.published == recipe.published
    assert result.training_parameters > result.deployed_parameters
