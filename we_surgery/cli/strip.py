"""``we-strip``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from we_surgery.cli.common import (
    SurgeryCommand,
    make_source,
    output_options,
    parse_shape,
    progress_bar,
    say,
    source_options,
)
from we_surgery.jobs import strip_file


@click.command("strip", cls=SurgeryCommand)
@source_options
@click.option(
    "--input-shape",
    metavar="SHAPE",
    help="Compare the outputs of both models on random inputs, such as 1,3,224,224.",
)
@output_options
def strip_command(
    input_shape: str | None,
    output: Path | None,
    to: str | None,
    force: bool,
    as_json: bool,
    **source_arguments: Any,
) -> None:
    """Fold the excited weights of SOURCE into vanilla ones, proven equal.

    SOURCE is a converted module, or any trainer's checkpoint of one: a state dict, bare or
    wrapped, pickled or .safetensors. A state dict needs no model code. The result is of the
    same kind and lies beside SOURCE, as model.stripped.pt; it needs nothing of we_surgery.

    \b
    Examples:
      we-strip model.we.pt --input-shape 1,3,224,224
      we-strip checkpoint.pt -o deploy.safetensors
      we-strip last.pth.tar --key state_dict_ema

    \b
    Exit codes: 0 done, 1 the proof failed or there is nothing to strip, 2 bad usage or
    unreadable input. No file is written but with exit code 0.
    """
    source = make_source(**source_arguments)
    shape = parse_shape(input_shape)
    with progress_bar("folding") as progress:
        result = strip_file(
            source, output=output, to=to, force=force, input_shape=shape, progress=progress
        )
    report = result.report
    for note in result.notes:
        say(f"note: {note}")
    say(
        f"{report.layers} weights folded, each bit-equal to its excited one; "
        f"{report.removed_parameters:,} training-only values removed"
    )
    if report.transplants:
        say(f"{report.transplants} transplants taken out")
    if report.output_difference is not None:
        say(
            f"largest output difference {report.output_difference:g} "
            f"({report.relative_difference:g} relative)"
        )
    say(f"wrote {result.target} ({result.kind})")
    if as_json:
        row = {"target": str(result.target), "kind": result.kind, "notes": result.notes}
        click.echo(json.dumps({**row, "report": asdict(report)}, indent=2))
