"""``we-surgery run``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from we_surgery._util import shipped
from we_surgery._util.progress import progress_bar
from we_surgery.cli.common import (
    SurgeryCommand,
    complete_names,
    json_option,
    print_table,
    say,
    say_written,
)

# Each epoch and process adds to it, and numpy's seeds have 32 bits.
_SEED = click.IntRange(0, 2**31 - 1)


@click.command("run", cls=SurgeryCommand, short_help="Train and strip an experiment of the papers.")
@click.argument(
    "recipe",
    type=click.Path(path_type=Path),
    shell_complete=complete_names(shipped.RECIPES),
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the images, in the layout that the recipe names.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the run.  [default: runs/RECIPE]",
)
@click.option(
    "--backbone",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Trained weights of the backbone, for recipes that start from one.",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the folder.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Train one epoch of two synthetic batches instead of the images.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, mps, ...")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Processes reading images.",
)
@click.option(
    "--step-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images per process and step; gradients are accumulated to the recipe's batch size.",
)
@click.option(
    "--form",
    type=click.Choice(["attached", "converted"]),
    help="Where the excitation is, instead of the recipe's choice: in the optimizer's step or in "
    "the layers. Both train the same weights.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the forward pass, instead of the recipe's; half precision is mixed (AMP).",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seeds the whole run.")
@json_option
def run_command(
    recipe: Path,
    data: Path | None,
    output: Path | None,
    backbone: Path | None,
    resume: bool,
    dry_run: bool,
    device: str,
    workers: int,
    step_batch: int | None,
    form: Literal["attached", "converted"] | None,
    precision: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train, strip and verify an experiment of the papers, described by RECIPE.

    RECIPE is the name of a recipe that comes with the package, or a YAML file. The run's folder
    gets summary.csv, checkpoints, the stripped state dict and result.json, which holds this run's
    figures beside the published ones.

    \b
    Examples:
      we-surgery run imagenet/resnet50-lwe --dry-run
      we-surgery run cifar100/vgg19-lwe --data DIR --device cuda
      torchrun --nproc-per-node 8 -m we_surgery run imagenet/resnet50-lwe \\
        --data DIR --device cuda --precision bfloat16

    \b
    Exit codes: 0 done, 1 training or the proof failed, 2 bad usage or missing images.
    """
    shipped.check_recipe(recipe)
    from we_surgery.recipes import load_recipe, run_recipe

    settings = load_recipe(recipe).replace(form=form)
    if precision is not None:
        settings = settings.replace(precision=precision)
    with progress_bar(settings.title, unit="") as progress:
        result = run_recipe(
            settings,
            data,
            output or Path("runs") / settings.name,
            backbone=backbone,
            resume=resume,
            dry_run=dry_run,
            device=device,
            workers=workers,
            step_batch=step_batch,
            seed=seed,
            progress=progress,
        )
    if result is None:
        return
    say_written(Path(result.file))
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
        return
    from rich.table import Table

    table = Table("metric", "published", "best epoch", "last epoch", "stripped")
    for name in result.stripped:
        figures = (result.published, result.best, result.last, result.stripped)
        table.add_row(name, *(f"{row[name]:.2f}" if name in row else "" for row in figures))
    print_table(table)
    say(f"published in {result.source}")
    say(
        f"parameters: {result.training_parameters:,} in training, "
        f"{result.deployed_parameters:,} deployed"
    )
    if result.zeros > 1:
        say(f"{result.zeros:.1f} % of the stripped weights are 0")
