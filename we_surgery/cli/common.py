"""What the commands share: options, errors with exit codes, the console, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from we_surgery.errors import InputError, WESurgeryError
from we_surgery.jobs import Source
from we_surgery.targets import KINDS

Command = TypeVar("Command", bound=Callable[..., Any])

# Wide enough for a table's reasons where the output is a file or a pipe.
_WIDTH_WITHOUT_TERMINAL = 140


class SurgeryCommand(click.Command):
    """A command whose expected errors are two lines, cause and cure, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WESurgeryError as error:
            click.echo(f"error: {error.cause}\n  fix: {error.cure}", err=True)
            ctx.exit(error.exit_code)


def source_options(command: Command) -> Command:
    """The argument and options that say where a model comes from."""
    return click.argument("source")(opening_options(command))


def opening_options(command: Command) -> Command:
    """The options that say how a file is opened, for a command with arguments of its own."""
    for decorate in reversed(
        [
            click.option(
                "--arch",
                metavar="NAME",
                help="Architecture of a file that holds only weights: torchvision:NAME, "
                "timm:NAME or package.module:factory.",
            ),
            click.option(
                "--arch-arg",
                "arch_args",
                multiple=True,
                metavar="KEY=VALUE",
                help="Keyword argument of the architecture, such as num_classes=10. Repeatable.",
            ),
            click.option(
                "--key",
                metavar="NAME",
                help="Where in a wrapped checkpoint the state dict is, such as state_dict_ema.",
            ),
            click.option(
                "--allow",
                multiple=True,
                metavar="PACKAGE",
                help="Import PACKAGE and let the file name its nn.Module classes. Repeatable.",
            ),
            click.option(
                "--trust",
                is_flag=True,
                help="Unpickle whatever the file says, which runs its code. Only for files of "
                "your own.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def output_options(command: Command) -> Command:
    """The options that say what is written where."""
    for decorate in reversed(
        [
            click.option(
                "-o",
                "--output",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="File to write; by default beside the input.",
            ),
            click.option(
                "--to",
                type=click.Choice(KINDS),
                help="Kind of file to write; by default the input's.",
            ),
            click.option("--force", is_flag=True, help="Overwrite FILE if it exists."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."),
        ]
    ):
        command = decorate(command)
    return command


def make_source(
    source: str,
    arch: str | None,
    arch_args: Sequence[str],
    key: str | None,
    allow: Sequence[str],
    trust: bool,
) -> Source:
    """The options of :func:`source_options` as a :class:`~we_surgery.jobs.Source`."""
    arguments = dict(_key_value(text) for text in arch_args)
    return Source(source, arch, arguments, key, allow=tuple(allow), trust=trust)


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            f"--arch-arg takes KEY=VALUE, not {text!r}", "Write for example num_classes=10."
        )
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            f"the value of --arch-arg {text!r} cannot be read", "Quote it as a YAML value."
        ) from error


def parse_shape(text: str | None) -> list[int] | None:
    """``1,3,224,224`` as numbers; None for no text."""
    if text is None:
        return None
    try:
        shape = [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1:
        raise InputError(
            f"--input-shape takes positive numbers with commas, not {text!r}",
            "Write for example 1,3,224,224.",
        )
    return shape


def console() -> Console:
    """Standard output, for tables."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def say(message: str) -> None:
    """A line for people, on stderr: stdout is kept for tables and JSON."""
    click.echo(message, err=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, shown in a terminal alone; yields ``update(done, total)``."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
