"""``we-inspect``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from we_surgery.cli.common import (
    FILE,
    SurgeryCommand,
    check_exists,
    console,
    make_source,
    opening_options,
    print_table,
    print_text,
    say_notes,
    say_written,
)
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from we_surgery.analysis.learned import WeightStatistics
    from we_surgery.analysis.results import LocationMaps
    from we_surgery.jobs.inspect import Comparison, Inspection

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = " .:-=+*#@"


@click.command(
    "inspect", cls=SurgeryCommand, short_help="Tell what files hold and what they learned."
)
@click.argument("sources", nargs=-1, required=True, type=FILE)
@opening_options
@click.option(
    "--start",
    type=FILE,
    metavar="FILE",
    help="The same model before training; tells how far each weight and excitation has come.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one self-contained page: plan, distributions, parameters and cost.",
)
@click.option(
    "--maps",
    "maps_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance maps for the page: the JSON file of `we-surgery analyse location`.",
)
@click.option("--force", is_flag=True, help="Overwrite the page if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def inspect_command(
    sources: Sequence[str],
    start: str | None,
    html: Path | None,
    maps_path: Path | None,
    force: bool,
    as_json: bool,
    **opening: Any,
) -> None:
    """Tell what SOURCES are, which of their weights are excited, and what these learned.

    With several SOURCES they are put side by side.

    \b
    Examples:
      we-inspect trained.we.pt
      we-inspect trained.we.pt --start model.we.pt --html report.html
      we-inspect first.we.pt second.we.pt
      we-inspect last.pth.tar --key state_dict_ema --json
      we-inspect dcp_folder/

    \b
    Exit codes: 0 done, 2 bad usage or unreadable input.
    """
    if maps_path is not None and html is None:
        raise InputError("--maps was given without --html", "Add --html FILE.")
    for source in (*sources, *([] if start is None else [start])):
        check_exists(source)

    from we_surgery.analysis.saving import to_json
    from we_surgery.checkpoint import check_target, write_bytes
    from we_surgery.jobs.convert import Source
    from we_surgery.jobs.html_report import html_report
    from we_surgery.jobs.inspect import Comparison, compare_files, inspect_file

    if html is not None:
        check_target(html, force=force)
    maps = None if maps_path is None else _read_maps(maps_path)
    opened = [make_source(source, **opening) for source in sources]
    before = None if start is None else Source(start, allow=opened[0].allow, trust=opened[0].trust)
    found: Inspection | Comparison
    if len(opened) == 1:
        found = inspect_file(opened[0], before)
        files = [found]
    else:
        found = compare_files(opened, before)
        files = found.inspections
    for file in files:
        say_notes(file.notes)
    if html is not None:
        write_bytes(html_report(found, maps).encode(), html, force=force)
        say_written(html)
    if as_json:
        print_text(to_json(found.to_dict()))
        return
    if isinstance(found, Comparison):
        print_table(_side_by_side(found))
    elif found.layers:
        print_table(_table(found))
    for file in files:
        print_table(_summary(file), highlight=False, markup=False, soft_wrap=True)


def _read_maps(path: Path) -> LocationMaps:
    from we_surgery.analysis.results import LocationMaps

    try:
        return LocationMaps.from_dict(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {' '.join(str(error).split())}",
            "Give the JSON file that `we-surgery analyse location` wrote.",
        ) from error


def _table(found: Inspection) -> Table:
    from rich.table import Table
    from rich.text import Text

    rows = [layer.statistics for layer in found.layers]
    columns: dict[str, list[str]] = {
        "layer": [layer.name for layer in found.layers],
        "shape": ["x".join(map(str, layer.shape)) for layer in found.layers],
        "excitation": ["+".join(layer.stages) for layer in found.layers],
        "added": [f"{layer.added:,}" for layer in found.layers],
        "multipliers": [_histogram(row) for row in rows],
        "range": [
            "" if (m := row.multiplier) is None else f"{m.minimum:.2f}..{m.maximum:.2f}"
            for row in rows
        ],
        "near 0, 1": [
            "" if (m := row.multiplier) is None else f"{m.near_zero:.0%}, {m.near_one:.0%}"
            for row in rows
        ],
        "gain": [
            "" if (g := row.gain) is None else f"{g.mean:.2f}..{g.maximum:.2f}" for row in rows
        ],
        "norm": [f"{row.raw_norm:.3g} > {row.excited_norm:.3g}" for row in rows],
        "moved": [_moved(row) for row in rows],
        "verdict": [row.verdict for row in rows],
    }
    kept = ("layer", "shape", "excitation")
    table = Table(header_style="bold", padding=(0, 0), collapse_padding=True)
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    for name in shown:
        table.add_column(name, no_wrap=name in kept, overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _histogram(row: WeightStatistics) -> str:
    if row.multiplier is None:
        return ""
    # Half as many characters as bins.
    counts = row.multiplier.histogram
    pairs = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    highest = max(*pairs, 1)
    blocks = _BLOCKS if console().encoding.startswith("utf") else _PLAIN_BLOCKS
    return "".join(blocks[-(-8 * count // highest)] for count in pairs)


def _moved(row: WeightStatistics) -> str:
    found = (row.raw_distance, row.excitation_distance)
    return ", ".join(f"{distance:.0%}" for distance in found if distance is not None)


def _side_by_side(found: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("layer", no_wrap=True)
    for number, _ in enumerate(found.inspections, 1):
        table.add_column(f"excitation {number}")
        table.add_column(f"multipliers {number}")
        table.add_column(f"mean {number}", justify="right")
    table.add_column("correlation", justify="right")
    table.add_column("distance", justify="right")
    for row in found.weights:
        cells: list[str] = []
        for weight in row.weights:
            if weight is None:
                cells += ["-", "", ""]
                continue
            multiplier = weight.statistics.multiplier
            cells += [
                "+".join(weight.stages),
                _histogram(weight.statistics),
                "" if multiplier is None else f"{multiplier.mean:.3f}",
            ]
        correlation = "" if row.correlation is None else f"{row.correlation:.2f}"
        distance = "" if row.distance is None else f"{row.distance:.1%}"
        table.add_row(*map(Text, (row.name, *cells, correlation, distance)))
    return table


def _summary(found: Inspection) -> str:
    added = sum(layer.added for layer in found.layers)
    lines = [f"{found.source}: {found.kind}, {found.tensors} tensors, {found.values:,} values"]
    if found.architecture is not None:
        lines.append(f"architecture {found.architecture}")
    if found.layers:
        mode = f", mode {found.mode}" if found.mode else ""
        excited = f"{len(found.layers)} excited weights{mode}"
        lines.append(
            f"attached: {excited}; the model is vanilla, and {added:,} values of excitations are "
            "in the optimizer's state"
            if found.is_attached
            else f"converted: {excited}; {added:,} values are gone after we-strip"
        )
        lines.append(found.learned)
    else:
        lines.append("vanilla: no excited weights")
    return "\n".join(lines)
