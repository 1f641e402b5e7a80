"""``we-strip``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from we_surgery._util.progress import progress_bar
from we_surgery.cli.choices import DEPLOY_FORMS, DTYPES
from we_surgery.cli.common import (
    SurgeryCommand,
    make_source,
    output_options,
    parse_shape,
    say,
    say_notes,
    say_written,
    source_options,
)
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from we_surgery.checkpoint import Weights
    from we_surgery.jobs.strip import Stripped


@click.command(
    "strip", cls=SurgeryCommand, short_help="Fold excited weights into vanilla ones, verified."
)
@source_options
@click.option(
    "--raw",
    is_flag=True,
    help="Strip the trained weights of a checkpoint, under any key. Without this "
    "and --ema: the first of state_dict, model, state_dict_ema, model_ema and ema.",
)
@click.option("--ema", is_flag=True, help="Strip their running average (EMA) instead.")
@click.option(
    "--both",
    is_flag=True,
    help="Strip the trained weights and the average, which goes to a second file, "
    "model.stripped.ema.pt.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Fold in float32, then cast all floating-point tensors. By default each keeps its dtype.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Run the excited and the stripped model and compare their outputs; needs a pickled "
    "module or an architecture (from --arch or the file).",
)
@click.option(
    "--input-shape",
    metavar="SHAPE",
    help="Compare the outputs on random inputs of this shape, such as 1,3,224,224; by default "
    "the size that timm or torchvision gives for the model.",
)
@click.option(
    "--deploy",
    type=click.Choice(DEPLOY_FORMS),
    default="dense",
    show_default=True,
    help="shift: replace each conv that has one weight per kernel (left by hardened, shared "
    "shift attention) by a shift and a 1x1 conv. Opening the file then needs we_surgery.",
)
@output_options("File, or folder of shards,")
def strip_command(
    raw: bool,
    ema: bool,
    both: bool,
    dtype: str | None,
    verify: bool,
    input_shape: str | None,
    deploy: str,
    output: str | None,
    to: str | None,
    force: bool,
    as_json: bool,
    **source_arguments: Any,
) -> None:
    """Fold the excited weights of SOURCE into vanilla ones, and verify them.

    SOURCE is a converted module or a trainer's checkpoint of one: a state dict, bare or wrapped,
    pickled or .safetensors; an index of shards; or a folder of torch.distributed.checkpoint,
    transformers or accelerate. No model code is needed for a state dict. The result is of the
    same kind, does not need we_surgery, and is written beside SOURCE, as model.stripped.pt.
    Sharded checkpoints are stripped tensor by tensor into a folder of safetensors shards, or
    into one file with -o FILE.safetensors. Other files of a folder are copied.

    \b
    Examples:
      we-strip model.we.pt --verify
      we-strip checkpoint.pt -o deploy.safetensors
      we-strip last.pth.tar --ema --arch timm:resnet50 --verify
      we-strip last.pth.tar --both --dtype bfloat16
      we-strip model.safetensors.index.json -o deploy/
      we-strip checkpoint-500/ -o deploy/
      we-strip dcp_folder/ --key model -o deploy.safetensors

    \b
    Exit codes: 0 done, 1 a proof failed or there is nothing to strip, 2 bad usage or
    unreadable input. Files are written only on exit code 0.
    """
    if raw + ema + both > 1:
        raise InputError(
            "more than one of --raw, --ema and --both was given",
            "Give one of them; --both strips the trained weights and their average.",
        )
    shape = parse_shape(input_shape)
    source = make_source(**source_arguments)

    import torch

    from we_surgery.jobs.strip import StripOptions, strip_files

    with progress_bar("folding", unit="") as progress:
        options = StripOptions(
            output=output,
            to=to,
            force=force,
            dtype=None if dtype is None else getattr(torch, dtype),
            verify=verify,
            input_shape=shape,
            deploy=deploy,
            progress=progress,
        )
        chosen: list[Weights | None] = ["raw" if raw else "ema" if ema else None]
        sources = [replace(source, weights=w) for w in (("raw", "ema") if both else chosen)]
        results = strip_files(sources, options)
    for result in results:
        _say(result)
    if as_json:
        rows = [_row(result) for result in results]
        click.echo(json.dumps(rows if both else rows[0], indent=2))


def _say(result: Stripped) -> None:
    report = result.report
    say_notes(result.notes)
    say(
        f"{report.layers} weights folded, each bit-equal to its excited one; "
        f"{report.removed_parameters:,} training-only values removed"
    )
    if report.transplants:
        say(f"{report.transplants} transplants removed")
    if report.deployed:
        say(f"{report.deployed} layers replaced by their deploy form")
    parity = f"parity: all {result.tensors} tensors read back bit-equal"
    if report.output_difference is not None:
        parity += (
            f"; largest output difference {report.output_difference:g} "
            f"({report.relative_difference:g} relative)"
        )
    say(parity)
    say_written(result.target, kind=result.kind)
    for path, digest in result.sha256.items():
        say(f"sha256 {digest}  {path}")


def _row(result: Stripped) -> dict[str, Any]:
    return {**asdict(result), "target": str(result.target)}
