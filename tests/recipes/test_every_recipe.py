"""Each recipe of configs/ fits its network, on tensors without memory; one of each task runs."""

import dataclasses
from pathlib import Path

import pytest
import torch

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


def test_there_are_recipes():
    assert len(EXPERIMENTS) > 90


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_recipe_fits_its_network(name):
    recipe = load_recipe(RECIPES / name)
    with torch.device("meta"):
        model = recipe.model.build()
    if recipe.surgery is not None:
        policy = make_policy(config=recipe.surgery)
        found = plan(model, config=recipe.surgery)
        assert bool(found.excited) == any(cell != "skip" for cell in policy.cells.values())
        put_in = {row.transplant for row in found.transplants if row.attach}
        assert put_in == {transplant.name for transplant in policy.transplants}
    assert recipe.form == ("converted" if recipe.training.sparsity else "attached")
    # Its optimizer, schedule and average are made as it says.
    process = ProcessInfo(torch.device("cpu"))
    run = TrainingRun(recipe, model, None, process, steps=4, accumulation=1, seed=0)
    assert run.epochs >= recipe.training.epochs


@pytest.mark.parametrize(
    "name",
    [
        "imagenet/resnet18-lwe-se.yaml",
        "voc/deeplabv3-resnet50-lwe.yaml",
        "mini-kinetics/r3d-18-lwe.yaml",
    ],
)
def test_a_recipe_of_each_task_runs_dry(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    size = (3, *(min(side, 32) for side in recipe.data.input_size[1:]))
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, input_size=size)
    ).replace(batch_size=2)
    result = run_recipe(recipe, None, tmp_path / "run", dry_run=True)
    assert result.published == recipe.published
    assert result.training_parameters > result.deployed_parameters
