"""``we-inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from we_surgery.cli.common import SurgeryCommand, console, make_source, say, source_options
from we_surgery.inspection import Inspection, inspect_file


@click.command("inspect", cls=SurgeryCommand)
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def inspect_command(as_json: bool, **source_arguments: Any) -> None:
    """Tell what SOURCE is and which of its weights are excited.

    \b
    Examples:
      we-inspect model.we.pt
      we-inspect last.pth.tar --key state_dict_ema --json
      we-inspect dcp_folder/

    \b
    Exit codes: 0 done, 2 bad usage or unreadable input.
    """
    found = inspect_file(make_source(**source_arguments))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    for note in found.notes:
        say(f"note: {note}")
    if found.layers:
        console().print(_table(found))
    console().print(_summary(found), highlight=False)


def _table(found: Inspection) -> Table:
    table = Table("layer", "shape", "excitation", header_style="bold")
    table.add_column("training-only values", justify="right")
    for layer in found.layers:
        shape = "x".join(map(str, layer.shape))
        table.add_row(layer.name, shape, "+".join(layer.stages), f"{layer.added:,}")
    return table


def _summary(found: Inspection) -> str:
    added = sum(layer.added for layer in found.layers)
    lines = [f"{found.source}: {found.kind}, {found.tensors} tensors, {found.values:,} values"]
    if found.architecture is not None:
        lines.append(f"architecture {found.architecture}")
    if found.layers:
        mode = f", mode {found.mode}" if found.mode else ""
        lines.append(
            f"converted: {len(found.layers)} excited weights{mode}; {added:,} values are gone "
            "after we-strip"
        )
    else:
        lines.append("vanilla: no excited weights")
    return "\n".join(lines)
