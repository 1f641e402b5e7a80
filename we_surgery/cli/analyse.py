"""``we-surgery analyse``: the papers' measurements on your model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from we_surgery._util.version import __version__
from we_surgery.cli.choices import CRITERIA, GRANULARITIES, SCORES, SWEEPS
from we_surgery.cli.common import (
    SEED,
    SurgeryCommand,
    force_option,
    json_option,
    make_source,
    options,
    print_table,
    say,
    say_notes,
    say_written,
    source_options,
    table_width,
)
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from we_surgery.analysis.results import Result
    from we_surgery.analysis.sweeps import Sweep
    from we_surgery.jobs.convert import Source

_EXIT_CODES = "Exit codes: 0 done, 1 the analysis failed, 2 bad usage or unreadable input."


@click.group("analyse")
@click.version_option(__version__, package_name="we-surgery")
def analyse_group() -> None:
    """Measure how much a model's weights matter, and draw the result.

    Data and metrics are functions of yours, named as package.module:function; modules in the
    current folder are found. A converted model is measured as it would be deployed. Progress is
    kept in STEM.progress.jsonl: run the same command again to continue.

    \b
    Examples:
      we-surgery analyse importance model.pt --loader my_data:test_loader -o out/importance
      we-surgery analyse location trained.we.pt --loader my_data:test_loader -o out/location
      we-surgery analyse multipliers trained.we.pt --metric my_code:top1 -o out/multipliers
      we-surgery analyse prune trained.we.pt --loader my_data:test_loader -o out/prune
    """


result_options = options(
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        metavar="STEM",
        help="Writes STEM.json, STEM.csv, STEM.png and STEM.svg.",
    ),
    click.option("--no-picture", is_flag=True, help="Write no PNG and SVG."),
    force_option,
    json_option,
)

measuring_options = options(
    click.option(
        "--loader",
        metavar="NAME",
        help="package.module:function that returns an iterable of (inputs, labels).",
    ),
    click.option(
        "--metric",
        metavar="NAME",
        help="package.module:function that takes a model and returns a number (higher is better). "
        "Instead of --loader.",
    ),
    click.option(
        "--score",
        type=click.Choice(SCORES),
        default="accuracy",
        show_default=True,
        help="Score of a batch; log_likelihood changes even if no prediction does.",
    ),
    result_options,
)

layers_option = click.option(
    "--layers",
    multiple=True,
    metavar="PATTERN",
    help="Only matching layers: a name glob, re:REGEX or type:CLASS. Repeatable.",
)
seed_option = click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Seed for random choices."
)


@analyse_group.command("importance", cls=SurgeryCommand, epilog=_EXIT_CODES)
@source_options
@click.option(
    "--steps",
    type=click.IntRange(1, 100),
    default=100,
    show_default=True,
    help="Number of percentiles to measure, evenly up to the 100th.",
)
@layers_option
@measuring_options
def importance_command(steps: int, **options: Any) -> None:
    """Zero the weight at each percentile of magnitude, in all conv layers at once (Fig. 1a).

    \b
    Example:
      we-surgery analyse importance model.pt --loader my_data:test_loader -o out/importance
    """
    positions = sorted({round(100 * (step + 1) / steps) for step in range(steps)})
    _analyse(_source(options), "magnitude_curve", options, positions=positions)


@analyse_group.command("location", cls=SurgeryCommand, epilog=_EXIT_CODES)
@source_options
@click.option(
    "--samples",
    nargs=2,
    type=click.IntRange(1),
    default=(5, 5),
    show_default=True,
    help="Output channels per layer, and input channels per output channel.",
)
@layers_option
@measuring_options
def location_command(samples: tuple[int, int], **options: Any) -> None:
    """Zero single kernels of each conv with a kernel larger than 1: a heat map per layer (Fig. 2).

    \b
    Example:
      we-surgery analyse location model.pt --loader my_data:test_loader -o out/location
    """
    _analyse(_source(options), "location_maps", options, samples=samples)


@analyse_group.command("multipliers", cls=SurgeryCommand, epilog=_EXIT_CODES)
@source_options
@click.option(
    "--granularity",
    "granularities",
    multiple=True,
    type=click.Choice(GRANULARITIES),
    help="The unit that is removed. Repeatable.  [default: all]",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    help="Remove this share of each layer's units instead of a single one.",
)
@click.option(
    "--random-draws",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Number of random draws to compare with.",
)
@seed_option
@layers_option
@measuring_options
def multipliers_command(granularities: Sequence[str], **options: Any) -> None:
    """Remove the units with the lowest multipliers in each layer, then the highest (D_L, D_H).

    \b
    Example:
      we-surgery analyse multipliers trained.we.pt --loader my_data:test_loader -o out/multipliers
    """
    _analyse(
        _source(options),
        "multiplier_validity",
        options,
        granularities=granularities or GRANULARITIES,
    )


@analyse_group.command("prune", cls=SurgeryCommand, epilog=_EXIT_CODES)
@source_options
@click.option(
    "--share",
    "shares",
    multiple=True,
    type=click.FloatRange(0, 1),
    default=(0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    show_default=True,
    help="Share of each layer's kernels to remove. Repeatable.",
)
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    type=click.Choice(CRITERIA),
    help="Which kernels go first. Repeatable.  [default: all]",
)
@seed_option
@layers_option
@measuring_options
def prune_command(criteria: Sequence[str], **options: Any) -> None:
    """Remove kernels by lowest multiplier, and compare with smallest and random ones.

    \b
    Example:
      we-surgery analyse prune trained.we.pt --loader my_data:test_loader --share 0.1 -o out/prune
    """
    _analyse(_source(options), "pruning_curve", options, criteria=criteria or CRITERIA)


@analyse_group.command("sensitivity", cls=SurgeryCommand, epilog=_EXIT_CODES)
@source_options
@click.option(
    "--vary",
    type=click.Choice(SWEEPS),
    required=True,
    help="epsilon of MWE, reduction of LWE, initialization of LWE, or training without norms.",
)
@click.option(
    "--train",
    required=True,
    metavar="NAME",
    help="package.module:function that takes a model and a seed and trains the model in place.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each variant."
)
@measuring_options
def sensitivity_command(vary: str, train: str, seeds: int, **options: Any) -> None:
    """Train SOURCE once per setting and seed, and compare runs of equal seeds.

    SOURCE is a vanilla model or an architecture; an architecture is built anew for each seed.

    \b
    Example:
      we-surgery analyse sensitivity torchvision:resnet18 --arch-arg num_classes=10 \\
        --vary epsilon --train my_code:train --loader my_data:test_loader -o out/epsilon
    """
    source = _source(options)

    from we_surgery._util.imports import imported
    from we_surgery.analysis import sweeps, variants

    make_variants: dict[str, Callable[[], dict[str, variants.Variant]]] = {
        "epsilon": variants.epsilon_variants,
        "reduction": variants.reduction_variants,
        "initialization": variants.initialization_variants,
        "no-normalization": variants.normalization_free_variants,
    }
    train_fn = imported("--train", train)

    def analysis(_: Any, metric: Any, **rest: Any) -> Sweep:
        def make_model() -> Any:
            return source.load(source.read())

        return sweeps.sweep(make_model, make_variants[vary](), train_fn, metric, title=vary, **rest)

    _analyse(source, analysis, options, seeds=range(seeds), vanilla=True)


@analyse_group.command("curve", cls=SurgeryCommand, epilog=_EXIT_CODES)
@click.argument("names", nargs=-1, metavar="[CURVE]...")
@click.option(
    "--epsilon", type=float, default=0.1, show_default=True, help="MWE's epsilon, 1e-6 to 1."
)
@click.option(
    "--largest", type=float, default=1.0, show_default=True, help="The layer's largest weight."
)
@click.option(
    "--plain",
    is_flag=True,
    help="Curves of the weight itself, as eq. 3.7 of the thesis is printed.",
)
@result_options
def curve_command(
    names: tuple[str, ...],
    epsilon: float,
    largest: float,
    plain: bool,
    output: Path,
    no_picture: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Draw MWE's curves, all or those named, and the gains of their gradients.

    \b
    Example:
      we-surgery analyse curve atanh novel --epsilon 0.1 -o out/curves
    """
    from we_surgery.analysis.curves import curve_drawing
    from we_surgery.analysis.saving import check_result
    from we_surgery.excitations.mwe import CURVES

    check_result(output, picture=not no_picture, force=force)
    curves = names or tuple(CURVES)
    result = curve_drawing(curves, epsilon=epsilon, largest=largest, relative=not plain)
    _show(result, output, picture=not no_picture, force=force, as_json=as_json)


def _source(options: dict[str, Any]) -> Source:
    names = ("source", "arch", "arch_args", "key", "allow", "trust")
    return make_source(**{name: options.pop(name) for name in names})


def _analyse(
    source: Source,
    analysis: str | Callable[..., Result],
    options: dict[str, Any],
    *,
    vanilla: bool = False,
    **arguments: Any,
) -> None:
    """Runs one analysis, a name of ``we_surgery.analysis`` or a function, and shows its result."""
    from we_surgery import analysis as analyses
    from we_surgery.analysis.saving import check_result
    from we_surgery.cli.user_functions import imported_metric
    from we_surgery.converted.state import is_converted

    run = getattr(analyses, analysis) if isinstance(analysis, str) else analysis
    output, picture = options.pop("output"), not options.pop("no_picture")
    force, as_json = options.pop("force"), options.pop("as_json")
    # Usage first: a slip must not cost an hour.
    check_result(output, picture=picture, force=force)
    metric = imported_metric(options.pop("metric"), options.pop("loader"))
    contents = source.read(with_excitation=not vanilla)
    say_notes(contents.notes)
    model = source.load(contents)
    if vanilla and is_converted(model):
        raise InputError(
            f"{source.name} is converted already", "Give the vanilla model; each run converts it."
        )
    progress_file = output.with_name(f"{output.name}.progress.jsonl")
    if progress_file.exists():
        say(f"continuing from {progress_file}")
    with analyses.progress_bar() as progress:
        result = run(
            model, metric, progress_file=progress_file, progress=progress, **arguments, **options
        )
    _show(result, output, picture=picture, force=force, as_json=as_json)


def _show(result: Result, output: Path, *, picture: bool, force: bool, as_json: bool) -> None:
    from we_surgery.analysis.saving import save_result, to_json

    say_written(*save_result(result, output, picture=picture, force=force))
    if as_json:
        click.echo(to_json(result.to_dict()))
    else:
        print_table(_table(result))


def _table(result: Result) -> Table:
    from we_surgery._util.tables import table_of

    rows = [
        {key.replace("_", " "): _cell(value) for key, value in row.items()}
        for row in result.summary()
    ]
    # The files have what a narrow terminal leaves out.
    return table_of(rows, width=table_width(), expendable=_EXPENDABLE, right=list(rows[0])[1:])


_EXPENDABLE = ("standard error", "sparsity", "model sparsity", "runs", "mean", "failed")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
