"""The configs and recipes that come with the package, by name: ``lwe``, ``imagenet/resnet50``."""

from __future__ import annotations

from pathlib import Path

from we_surgery.errors import InputError, near_matches

_IN_PACKAGE = Path(__file__).parents[1] / "configs"
# A link in a clone; where git makes no links, the folder itself.
CONFIGS = _IN_PACKAGE if _IN_PACKAGE.is_dir() else Path(__file__).parents[2] / "configs"
RECIPES = CONFIGS / "recipes"


def names_in(folder: Path) -> list[str]:
    """The names of the configs (:data:`CONFIGS`) or recipes (:data:`RECIPES`) there."""
    files = folder.glob("*.yaml") if folder == CONFIGS else folder.rglob("*.yaml")
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
    # What other recipes extend is no experiment.
    return [name for name in names if not name.endswith("base")]


def find(name: str | Path, folder: Path) -> Path:
    """The file of that name in ``folder``; anything else, such as a user's own file, as it is."""
    path = Path(name)
    if path.is_file() or path.as_posix() not in names_in(folder):
        return path
    return folder / f"{path.as_posix()}.yaml"


def check_recipe(name: str | Path) -> Path:
    """The recipe's file."""
    path = find(name, RECIPES)
    if not path.is_file():
        raise InputError(
            f"there is no recipe {path}{near_matches(str(path), names_in(RECIPES))}",
            "Give a YAML file, or the name of a recipe: docs/recipes.md lists them.",
        )
    return path
