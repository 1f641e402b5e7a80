import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipes_table

    yield recipes_table
    del sys.modules["recipes_table"]


def test_every_recipe_has_its_row(table):
    page = table.PAGE.read_text(encoding="utf-8")
    files = table.experiments(table.RECIPES)
    assert page.count("](../configs/recipes/") == len(files)
    for file in files:
        recipe = table.load_recipe(file)
        name = file.relative_to(table.RECIPES).as_posix()
        figures = ", ".join(f"{metric} {value:g}" for metric, value in recipe.published.items())
        row = f"({name}) | {recipe.title} | {figures} | {recipe.source} |"
        assert row.replace("(", "(../configs/recipes/", 1) in page, name


def test_the_computation_is_that_of_the_network(table):
    recipe = table.load_recipe(table.RECIPES / "imagenet" / "resnet50.yaml")
    # 4.09 billion multiply-adds.
    assert table.operations(recipe) == pytest.approx(2 * 4.09e9, rel=0.01)
