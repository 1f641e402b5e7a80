"""Each recipe of configs/ from the first step to the stripped file, at a reduced size."""

import dataclasses
from pathlib import Path

import pytest

from we_surgery.recipes import load_recipe, run_recipe

RECIPES = Path(__file__).parents[2] / "we_surgery" / "configs" / "recipes"
EXPERIMENTS = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in RECIPES.rglob("*.yaml")
    if not path.stem.endswith("base")
)

NARROW = {"we_surgery.recipes.networks:ResNeXt29": {"cardinality": 4, "base_width": 8}}
"""Arguments in place of a network's own where its size would cost minutes."""


def test_there_are_recipes():
    assert len(EXPERIMENTS) > 90


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_recipe_runs_dry(name, tmp_path):
    recipe = load_recipe(RECIPES / name)
    size = (3, *(min(side, 32) for side in recipe.data.input_size[1:]))
    model = dataclasses.replace(
        recipe.model, arguments={**recipe.model.arguments, **NARROW.get(recipe.model.name, {})}
    )
    data = dataclasses.replace(recipe.data, input_size=size)
    recipe = dataclasses.replace(recipe, model=model, data=data)
    result = run_recipe(recipe.replace(batch_size=2), None, tmp_path / "run", dry_run=True)
    assert result.published == recipe.published
    surgery = recipe.surgery or {"mode": "none"}
    if surgery["mode"] == "none" and "conv" not in surgery:
        assert result.output_difference is None
    else:
        assert result.output_difference < 1e-4
