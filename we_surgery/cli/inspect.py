"""``we-inspect``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from we_surgery.cli.common import (
    FILE,
    SurgeryCommand,
    check_exists,
    console,
    force_option,
    json_option,
    make_source,
    opening_options,
    print_table,
    say_notes,
    say_written,
    table_width,
    wide_option,
)
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from we_surgery.analysis.learned import WeightStatistics
    from we_surgery.analysis.quantization import Int8Error
    from we_surgery.analysis.results import Ablation
    from we_surgery.jobs.inspect import Comparison, InspectedWeight, Inspection

_BLOCKS = " ▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = " .:-=+*#@"


@click.command(
    "inspect", cls=SurgeryCommand, short_help="Show what files hold and what excitations learned."
)
@click.argument("sources", nargs=-1, required=True, type=FILE)
@opening_options
@click.option(
    "--start",
    type=FILE,
    metavar="FILE",
    help="The same model before training, to show how far each weight and excitation moved.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Read every weight, and show its range, its outliers and the error of int8.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one self-contained page: verdict, cost, distributions, int8 and plan.",
)
@click.option(
    "--maps",
    "maps_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance maps for the page: the JSON file of `we-surgery analyse location`.",
)
@wide_option
@force_option
@json_option
def inspect_command(
    sources: Sequence[str],
    start: str | None,
    int8: bool,
    html: Path | None,
    maps_path: Path | None,
    wide: bool,
    force: bool,
    as_json: bool,
    **opening: Any,
) -> None:
    """Show what SOURCES are, which weights are excited, and what the excitations learned.

    Several SOURCES are compared side by side.

    \b
    Examples:
      we-inspect trained.we.pt
      we-inspect trained.we.pt --start model.we.pt --html report.html
      we-inspect first.we.pt second.we.pt
      we-inspect model.pt --int8
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
    measured = int8 or html is not None
    found: Inspection | Comparison
    if len(opened) == 1:
        found = inspect_file(opened[0], before, int8=measured)
        files = [found]
    else:
        found = compare_files(opened, before, int8=measured)
        files = found.inspections
    for file in files:
        say_notes(file.notes)
    if html is not None:
        write_bytes(html_report(found, maps).encode(), html, force=force)
        say_written(html)
    if as_json:
        click.echo(to_json(found.to_dict()))
        return
    if isinstance(found, Comparison):
        if found.weights:
            print_table(_side_by_side(found, wide))
    elif found.layers:
        print_table(_table(found, wide))
    elif found.plain and not int8:
        print_table(_plain_table(found, wide))
    for file in files:
        if int8 and file.int8:
            print_table(_int8_table(file.int8, wide))
        print_table(_summary(file), highlight=False, markup=False, soft_wrap=True)


def _read_maps(path: Path) -> Ablation:
    from we_surgery.analysis.results import Ablation

    try:
        return Ablation.read_location_maps(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {' '.join(str(error).split())}",
            "Give the JSON file that `we-surgery analyse location` wrote.",
        ) from error


# Columns that go where a line is too short, of what is missed least first.
_EXPENDABLE = ("near 0, 1", "norm", "added", "gain", "shape", "range", "excitation", "moved")


def _table(found: Inspection, wide: bool) -> Table:
    from we_surgery._util.tables import table_of

    rows = [_row(layer) for layer in found.layers]
    width = None if wide else table_width()
    return table_of(rows, width=width, expendable=_EXPENDABLE, right=("added",))


def _row(layer: InspectedWeight) -> dict[str, str]:
    found, multiplier, gain = layer.statistics, layer.statistics.multiplier, layer.statistics.gain
    of_multiplier = {"multipliers": _histogram(found), "range": "", "near 0, 1": ""}
    if multiplier is not None:
        of_multiplier["range"] = f"{multiplier.minimum:.2f}..{multiplier.maximum:.2f}"
        of_multiplier["near 0, 1"] = f"{multiplier.near_zero:.0%}, {multiplier.near_one:.0%}"
    return {
        "layer": layer.name,
        "shape": "x".join(map(str, layer.shape)),
        "excitation": "+".join(layer.stages),
        "added": f"{layer.added:,}",
        **of_multiplier,
        "gain": "" if gain is None else f"{gain.mean:.2f}..{gain.maximum:.2f}",
        "norm": f"{found.raw_norm:.3g} > {found.excited_norm:.3g}",
        "moved": _moved(found),
        "verdict": found.verdict,
    }


def _plain_table(found: Inspection, wide: bool) -> Table:
    from we_surgery._util.tables import merge_rows, table_of

    rows = [
        {"weight": plain.name, "shape": "x".join(map(str, plain.shape)), "dtype": plain.dtype}
        for plain in found.plain
    ]
    shown = rows if wide else [row for row, _ in merge_rows(rows)]
    width = None if wide else table_width()
    return table_of(shown, width=width, expendable=("dtype", "n"), right=("n",))


def _int8_table(errors: Sequence[Int8Error], wide: bool) -> Table:
    from we_surgery._util.tables import table_of

    numbers = ("peak", "per tensor", "per channel")
    rows = [
        {
            "weight": error.name,
            "range": f"{error.low:.3g}..{error.high:.3g}",
            "peak": f"{error.peak:.1f}",
            "per tensor": f"{error.per_tensor:.1%}",
            "per channel": f"{error.per_channel:.1%}",
            "int8": error.advice or "fits",
        }
        for error in errors
    ]
    width = None if wide else table_width()
    return table_of(rows, width=width, expendable=("range", "peak"), right=numbers)


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


def _side_by_side(found: Comparison, wide: bool) -> Table:
    from we_surgery._util.tables import table_of

    rows = []
    for row in found.weights:
        cells = {"layer": row.name}
        for number, weight in enumerate(row.weights, 1):
            multiplier = None if weight is None else weight.statistics.multiplier
            cells |= {
                f"excitation {number}": "-" if weight is None else "+".join(weight.stages),
                f"multipliers {number}": "" if weight is None else _histogram(weight.statistics),
                f"mean {number}": "" if multiplier is None else f"{multiplier.mean:.3f}",
            }
        cells["correlation"] = "" if row.correlation is None else f"{row.correlation:.2f}"
        cells["distance"] = "" if row.distance is None else f"{row.distance:.1%}"
        rows.append(cells)
    means = [f"mean {number}" for number, _ in enumerate(found.inspections, 1)]
    others = [f"{what} {mean[5:]}" for what in ("multipliers", "excitation") for mean in means]
    return table_of(
        rows,
        width=None if wide else table_width(),
        expendable=(*means, *others, "correlation"),
        right=(*means, "correlation", "distance"),
    )


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
            else f"converted: {excited}; we-strip will remove {added:,} values"
        )
        lines.append(found.learned)
    else:
        lines += _what_to_do(found)
    lines += [found.int8_summary] if found.int8 is not None else []
    return "\n".join(lines)


def _what_to_do(found: Inspection) -> list[str]:
    quantized = sum(plain.is_quantized for plain in found.plain)
    if quantized:
        tensors = "1 tensor holds" if quantized == 1 else f"{quantized} tensors hold"
        return [
            f"quantized: {tensors} quantized weights or their scales, which cannot be excited; "
            "excite the float model, and quantize it after training"
        ]
    needs_architecture = found.kind != "module" and found.architecture is None
    architecture = " --arch NAME" if needs_architecture else ""
    command = f"we-convert {shlex.quote(str(found.source))}{architecture} --dry-run"
    return ["vanilla: no excited weights", f"next: `{command}` shows what would be excited"]
