"""The table of the papers' experiments, from the recipes themselves.

    python benchmarks/recipes_table.py

Writes ``docs/recipes.md``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from we_surgery.recipes import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "we_surgery" / "configs" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"

TITLES = {
    "imagenet": "ImageNet",
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "cinic10": "CINIC-10",
    "tiny-imagenet": "Tiny ImageNet",
    "voc": "PASCAL VOC 2012",
    "cityscapes": "Cityscapes",
    "mini-kinetics": "Mini-Kinetics",
    "jester": "Jester",
}

IMAGES = {
    "imagenet": 1_281_167,
    "cifar100": 50_000,
    "cifar10": 50_000,
    "cinic10": 90_000,
    "tiny-imagenet": 100_000,
    "voc": 10_582,
    "cityscapes": 2_975,
    "mini-kinetics": 80_000,
    "jester": 118_562,
}
"""Training images, or videos."""

# One forward pass and two as costly for the gradients of activations and of weights.
_PASSES = 3

HEAD = """# The papers' experiments as recipes

Written by `python benchmarks/recipes_table.py`; do not edit.

Each row is a file below [configs/recipes/](../configs/recipes), and goes by its name:
`we-surgery run imagenet/resnet50-lwe --data DIR` trains it, strips the model, and prints its
figures beside the published ones. This page has the published ones. The file's `notes` say what a
source leaves open, and what we chose.

The excitation of a recipe is [attached](how_attach_works.md) to the optimizer. `--form converted`
puts it into the layers and trains the same weights; a moving average (`ema_decay`) then averages
raw weights. In both forms a run writes `stripped.pt`, the vanilla state dict.

The tests build every recipe, and run one recipe per task on synthetic images. **We have not run any
of them to completion**: we lack the images and the GPU time.

*EFLOP* is the cost of training in 10^18 floating-point operations: three times the vanilla
network's forward pass, for all images and epochs.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip("\n")]
    for folder, title in TITLES.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| recipe | what | published | source | EFLOP |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(path) for path in experiments(RECIPES / folder)]
    return "\n".join(lines) + "\n"


def experiments(folder: Path) -> list[Path]:
    """The recipes below a folder, without those that are only extended."""
    return sorted(p for p in folder.rglob("*.yaml") if not p.stem.endswith("base"))


def operations(recipe: Recipe) -> int:
    """Floating-point operations of one forward pass of one image, by a pass without memory."""
    channels, *size = recipe.data.input_size
    frames = [recipe.data.frames] if recipe.task == "video" else []
    with torch.device("meta"):
        model = recipe.model.build().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, channels, *frames, *size))
    return counter.get_total_flops()


def epochs(recipe: Recipe) -> float:
    """All epochs of a run, those of each cycle of a schedule with restarts added up."""
    schedule = recipe.training.schedule
    cycles = range(schedule.get("cycle_limit", 1))
    return sum(recipe.training.epochs * schedule.get("cycle_mul", 1) ** cycle for cycle in cycles)


def _row(path: Path) -> str:
    recipe: Recipe = load_recipe(path)
    name = path.relative_to(RECIPES).as_posix()
    passes = _PASSES * epochs(recipe) * IMAGES[name.partition("/")[0]]
    figures = ", ".join(f"{metric} {value:g}" for metric, value in recipe.published.items())
    cells = (
        f"[{name}](../configs/recipes/{name})",
        recipe.title,
        figures,
        recipe.source,
        f"{passes * operations(recipe) / 1e18:.2g}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
