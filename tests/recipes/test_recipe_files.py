from pathlib import Path

import pytest
import yaml

from we_surgery.errors import InputError
from we_surgery.recipes import load_recipe

RECIPES = Path(__file__).parents[2] / "we_surgery" / "configs" / "recipes"
SETTINGS = {
    "title": "a network",
    "source": "nowhere",
    "task": "classification",
    "model": "torchvision:resnet18",
    "data": {"layout": "imagefolder", "classes": 3},
    "training": {"epochs": 1, "batch_size": 4, "optimizer": {"opt": "momentum", "lr": 0.1}},
}


def written(folder: Path, settings: dict, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_a_recipe_is_read(tmp_path):
    recipe = load_recipe(written(tmp_path, SETTINGS))
    assert (recipe.name, recipe.model.name) == ("mine", "torchvision:resnet18")
    assert recipe.data.input_size == (3, 224, 224)
    assert recipe.training.optimizer == {"opt": "momentum", "lr": 0.1}
    assert recipe.surgery is None


def test_a_recipe_extends_another_key_by_key(tmp_path):
    written(tmp_path, SETTINGS | {"surgery": {"mode": "lwe", "linear": "skip"}}, "base.yaml")
    over = {
        "extends": "base.yaml",
        "title": "another",
        "training": {"epochs": 7, "optimizer": {"lr": 0.5}},
        "surgery": {"mode": "mwe"},
    }
    recipe = load_recipe(written(tmp_path, over))
    assert (recipe.title, recipe.training.epochs, recipe.training.batch_size) == ("another", 7, 4)
    assert recipe.training.optimizer == {"opt": "momentum", "lr": 0.5}
    assert recipe.surgery == {"mode": "mwe"}


def test_a_circle_of_recipes_is_refused(tmp_path):
    written(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    with pytest.raises(InputError, match="extends itself"):
        load_recipe(written(tmp_path, {"extends": "a.yaml"}, "b.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'"),
        ({"task": "classify"}, "did you mean 'classification'"),
        ({"model": 3}, "does not name a model"),
        ({"model": {"name": "torchvision:resnet18", "args": {}}}, "unknown key 'args'"),
        ({"data": {"layout": "imagefolder"}}, "lacks classes"),
        ({"data": {"layout": "imagefolder", "classes": "ten"}}, "classes in .* cannot be 'ten'"),
        ({"data": {"layout": "imagefolder", "classes": True}}, "cannot be True"),
        ({"data": {"layout": "imagefolder", "classes": 3, "mean": 0.5}}, "mean in .* cannot be"),
        ({"surgery": {"mode": "lew"}}, "no mode called 'lew'"),
        ({"training": None}, "training in .* is not a mapping"),
        ({"published": {"top1": 3}, "backbone": "yes"}, "backbone in .* cannot be 'yes'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_recipe(written(tmp_path, SETTINGS | change))


def test_a_missing_value_is_named(tmp_path):
    with pytest.raises(InputError, match="lacks source"):
        load_recipe(written(tmp_path, {k: v for k, v in SETTINGS.items() if k != "source"}))


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="not a mapping but list"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(InputError, match="there is no recipe"):
        load_recipe(tmp_path / "absent.yaml")
