import pytest
from recipe_toys import picture

from we_surgery.checkpoint import Architecture
from we_surgery.recipes import Recipe
from we_surgery.recipes.recipe import Data, Training


@pytest.fixture
def image_folder(tmp_path):
    """Two classes with four images each, in both splits."""
    root = tmp_path / "images"
    for number, (split, name) in enumerate(
        (s, c) for s in ("train", "val") for c in ("cat", "dog")
    ):
        for index in range(4):
            picture(root / split / name / f"{index}.png", seed=10 * number + index)
    return root


@pytest.fixture
def recipe():
    """A recipe of a network small enough to be trained in a test."""
    return Recipe(
        name="tiny",
        title="a tiny network",
        source="nowhere",
        task="classification",
        model=Architecture("recipe_toys:tiny_network", {}),
        data=Data("imagefolder", classes=2, input_size=(3, 16, 16)),
        training=Training(
            epochs=3,
            batch_size=4,
            optimizer={"opt": "momentum", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
            schedule={"sched": "multistep", "decay_milestones": [2], "decay_rate": 0.1},
        ),
        published={"top1": 50.0},
        surgery={"mode": "lwe"},
    )
