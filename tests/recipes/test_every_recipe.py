"""Each recipe of configs/ from the first step to the stripped file, at a reduced size."""

import dataclasses
from pathlib import Path

import pytest

from we_surgery.recipes import load_recipe, run_recipe

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
EXPERIMENTS = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in RECIPES.rglob("*.yaml")
    if not path.stem.endswith("base")
)


def test_there_are_recipes():
    assert len(EXPERIMENTS) > 50


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_recipe_runs_dry(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    size = (3, *(min(side, 32) for side in recipe.data.input_size[1:]))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, input_size=size))
    result = run_recipe(recipe.replace(batch_size=2), None, tmp_path / "run", dry_run=True)
    assert result.published == recipe.published
    if recipe.surgery is not None:
        assert result.output_difference < 1e-4
