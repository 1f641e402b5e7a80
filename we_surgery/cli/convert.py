"""``we-convert``."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from we_surgery._util import shipped
from we_surgery.cli.choices import DEFAULT_MODE, INITS, MODES, STARTS
from we_surgery.cli.common import (
    SEED,
    SurgeryCommand,
    complete_names,
    make_source,
    output_options,
    parse_shape,
    print_table,
    say,
    say_notes,
    say_written,
    source_options,
    table_width,
    telling_errors,
    wide_option,
)
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from we_surgery.converted.sites import Init, Start
    from we_surgery.jobs.convert import Converted
    from we_surgery.planning.rules import Rule


class _ConvertCommand(SurgeryCommand):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # It needs no SOURCE, and says the same before and after --json.
        if "--list-modes" in args:
            from we_surgery.jobs.methods import family, family_table

            with telling_errors(ctx):
                if "--json" in args:
                    click.echo(json.dumps([method.to_dict() for method in family()], indent=2))
                else:
                    print_table(family_table())
            ctx.exit()
        return super().parse_args(ctx, args)


@click.command("convert", cls=_ConvertCommand, short_help="Excite a model, ready to train.")
@source_options
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="lwe: LWE on convs, MWE on linear layers. mwe: MWE on all layers. we: as lwe, and MWE on "
    "depthwise and shift-fed convs. lwe+mwe: both on convs. --list-modes explains all.  "
    f"[default: {DEFAULT_MODE}]",
)
@click.option(
    "--list-modes",
    is_flag=True,
    expose_value=False,
    help="List all modes and excitations with their options and sources, and do nothing else.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    shell_complete=complete_names(shipped.CONFIGS),
    help="A YAML file, or the name of a config in the package: lwe, mwe, vit, ...",
)
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Apply exactly this plan: the output of --dry-run --json, edited or not.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Skip matching layers, even if a --rule matches: a name glob, re:REGEX or type:CLASS. "
    "Repeatable.",
)
@click.option(
    "--rule",
    "rule_texts",
    multiple=True,
    metavar="PATTERN=STAGES",
    help="Stages for matching layers: lwe, mwe, lwe+mwe, lwe(attention=cbam), ... or skip; "
    "the last match wins. Repeatable.",
)
@click.option(
    "--option",
    "option_texts",
    multiple=True,
    metavar="STAGE.NAME=VALUE",
    help="Set an option of a stage, such as lwe.attention=cbam; --list-modes names them. "
    "Repeatable.",
)
@click.option(
    "--transplant",
    "transplants",
    multiple=True,
    metavar="NAME",
    help="Insert another method of the papers first, such as max_dropout or "
    "'max_dropout(rate=0.3)'; --list-modes names them. Repeatable.",
)
@click.option(
    "--init",
    type=click.Choice(INITS),
    help="paper: excitations are initialized as new layers, for untrained models. preserve: the "
    "outputs of the model stay the same. With --start paused this happens when excitation "
    "starts.  [default: paper; with --start paused: preserve where possible]",
)
@click.option(
    "--start",
    type=click.Choice(STARTS),
    default="on",
    show_default=True,
    help="paused: the model trains like the vanilla one until ws.resume or a WESchedule "
    "switches excitation on.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Seed for the new parameters."
)
@click.option(
    "--input-shape",
    metavar="SHAPE",
    help="Read the model by recording a forward pass on inputs of this shape, such as "
    "1,3,224,224, and check that no converted weight is bypassed.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@wide_option
@output_options("File")
def convert_command(
    mode: str | None,
    config: Path | None,
    plan_path: Path | None,
    skip: Sequence[str],
    rule_texts: Sequence[str],
    option_texts: Sequence[str],
    transplants: Sequence[str],
    init: Init | None,
    start: Start,
    seed: int,
    input_shape: str | None,
    dry_run: bool,
    wide: bool,
    output: str | None,
    to: str | None,
    force: bool,
    as_json: bool,
    **source_arguments: Any,
) -> None:
    """Add weight excitation to the layers of SOURCE, ready to train.

    SOURCE is a pickled module, a state dict or .safetensors file with --arch, a folder of
    transformers or accelerate, or an architecture: torchvision:resnet50, timm:mixer_s16_224,
    package.module:factory. The result is of the same kind and is written beside SOURCE, as
    model.we.pt, unless -o or --to is given. For a folder, its other files are copied.

    \b
    Examples:
      we-convert model.pt
      we-convert model.pt --dry-run
      we-convert pretrained.pt --init preserve
      we-convert model.pt --start paused
      we-convert torchvision:resnet50 --mode we -o resnet50.we.pt
      we-convert weights.safetensors --arch timm:mixer_s16_224 --skip head
      we-convert folder/ --arch transformers:folder --init preserve -o excited/
      we-convert model.pt --option lwe.attention=cbam --rule 'layer4.*=lwe(skip=true)+mwe'
      we-convert model.pt --dry-run --json > plan.json; we-convert model.pt --plan plan.json

    \b
    Exit codes: 0 done, 1 the surgery failed, 2 bad usage or unreadable input.
    """
    texts = (mode, config, skip, rule_texts, option_texts, transplants)
    if plan_path is not None and any(texts):
        raise InputError(
            "--plan was given together with --mode, --config, --skip, --rule, --option or "
            "--transplant",
            "Give the plan alone; edit its rows to change it.",
        )
    for text in rule_texts:
        _check_rule(text)
    option_parts = [_split_option(text) for text in option_texts]
    shape = parse_shape(input_shape)
    source = make_source(**source_arguments)

    from we_surgery.excitations.stage_text import SKIP
    from we_surgery.jobs.convert import convert_file, plan_file
    from we_surgery.planning.config import make_policy
    from we_surgery.planning.plans import Plan
    from we_surgery.planning.policy import Policy
    from we_surgery.planning.rules import Rule

    # The last match wins: what is named to be left alone is left alone.
    rules = [_rule(text) for text in rule_texts] + [Rule(pattern, SKIP) for pattern in skip]
    options = _options(option_parts)
    asked: Policy | Plan
    if plan_path is None:
        asked = make_policy(mode, config, rules=rules, transplants=transplants)
        asked = asked.with_options(options)
    else:
        asked = Plan.from_file(plan_path)
    if dry_run:
        _show_plan(plan_file(source, asked, input_shape=shape), as_json, wide)
        return
    result = convert_file(
        source,
        asked,
        output=output,
        to=to,
        force=force,
        seed=seed,
        input_shape=shape,
        init=init,
        start=start,
    )
    _show_result(result, as_json)


_RULE = "Write for example 'layer4.*=mwe' or 'layer4.*=lwe(attention=cbam)+mwe'."


def _check_rule(text: str) -> None:
    if not re.fullmatch(r"(?s).+=.+", text):
        raise InputError(f"--rule takes PATTERN=STAGES, not {text!r}", _RULE)


def _rule(text: str) -> Rule:
    from we_surgery.excitations.stage_text import STAGES_PATTERN
    from we_surgery.planning.rules import Rule

    # The last '=' before what can be a list of stages: a pattern may hold others.
    found = re.fullmatch(rf"(.+)=({STAGES_PATTERN})", text)
    if found is None:
        raise InputError(f"--rule takes PATTERN=STAGES, not {text!r}", _RULE)
    return Rule(found[1], found[2])


def _split_option(text: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)
    if found is None:
        raise InputError(
            f"--option takes STAGE.NAME=VALUE, not {text!r}",
            "Write for example lwe.attention=cbam.",
        )
    return found[1], found[2], found[3]


def _options(texts: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, Any]]:
    import yaml

    from we_surgery.excitations.stage_text import YAMLLoader

    options: dict[str, dict[str, Any]] = {}
    for stage, name, value in texts:
        try:
            options.setdefault(stage, {})[name] = yaml.load(value, YAMLLoader)
        except yaml.YAMLError as error:
            raise InputError(
                f"the value of --option '{stage}.{name}={value}' cannot be read",
                "Quote it as a YAML value.",
            ) from error
    return options


def _show_plan(result: Converted, as_json: bool, wide: bool) -> None:
    from we_surgery.planning.plans import plan_table

    say_notes(result.notes)
    if as_json:
        click.echo(result.plan.to_json())
    else:
        print_table(plan_table(result.plan, wide=wide, width=table_width()))


def _show_result(result: Converted, as_json: bool) -> None:
    from we_surgery.planning.plans import plan_summary

    say_notes(result.notes)
    say(plan_summary(result.plan))
    assert result.target is not None
    say_written(result.target, kind=result.kind)
    say(f"next: train it as always, then `we-strip {shlex.quote(str(result.target))}`")
    if as_json:
        row = {"target": str(result.target), "kind": result.kind, "notes": result.notes}
        click.echo(json.dumps({**row, "plan": result.plan.to_dict()}, indent=2))
