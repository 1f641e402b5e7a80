"""What the commands share: options, errors with exit codes, the console, progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from we_surgery.checkpoint.imports import import_package
from we_surgery.errors import InputError, WESurgeryError
from we_surgery.jobs import Source
from we_surgery.printing import SafeConsole, printable
from we_surgery.targets import KINDS

Command = TypeVar("Command", bound=Callable[..., Any])

SEED = click.IntRange(0, 2**32 - 1)
"""Seeds that torch takes, also where a command multiplies them."""

# Wide enough for a table's reasons where the output is a file or a pipe.
_WIDTH_WITHOUT_TERMINAL = 140


class SurgeryCommand(click.Command):
    """A command whose errors are two lines, cause and cure, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _cleaning_up_when_terminated():
                return super().invoke(ctx)
        except WESurgeryError as error:
            _say_error(error.cause, error.cure)
            ctx.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        # A model runs the code of its classes on whatever its file holds: anything can come.
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            cause = f"unexpected {type(error).__name__}: {error}"
            _say_error(cause, _OUT_OF_MEMORY if _is_out_of_memory(error) else _UNEXPECTED)
            ctx.exit(1)


TRACEBACK_VARIABLE = "WE_SURGERY_TRACEBACK"
"""The environment variable with which an unexpected error shows where it came from."""

_UNEXPECTED = (
    "Is the input sound? If it is, please report this, with the traceback that "
    f"{TRACEBACK_VARIABLE}=1 before the command shows. Nothing was written."
)
_OUT_OF_MEMORY = "Give the process more memory, or a smaller input. Nothing was written."


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Lets SIGTERM, which a scheduler sends, leave as an exception, so that no file is left."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread alone.
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch has no class of its own for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )


def _say_error(cause: str, cure: str) -> None:
    click.echo(f"error: {one_line(cause)}\n  fix: {one_line(cure)}", err=True)


def one_line(text: str) -> str:
    """Text that may come from a file, so that it neither breaks a line nor steers a terminal."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


_LONGEST_LINE = 1000


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
                help="Import PACKAGE, with the excitations it registers, and let the file name its "
                "nn.Module classes. Repeatable.",
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


def output_options(what: str) -> Callable[[Command], Command]:
    """The options that say what is written where; ``what`` is what ``-o`` may name."""
    options = [
        click.option(
            "-o",
            "--output",
            # Not a Path, which forgets a slash at the end.
            metavar="FILE",
            help=f"{what} to write; by default beside the input.",
        ),
        click.option(
            "--to",
            type=click.Choice(KINDS),
            help="Kind of file to write; by default the input's.",
        ),
        click.option("--force", is_flag=True, help="Overwrite what is there."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."),
    ]

    def decorate_all(command: Command) -> Command:
        for decorate in reversed(options):
            command = decorate(command)
        return command

    return decorate_all


def make_source(
    source: str,
    arch: str | None,
    arch_args: Sequence[str],
    key: str | None,
    allow: Sequence[str],
    trust: bool,
) -> Source:
    """The options of :func:`source_options` as a :class:`~we_surgery.jobs.Source`."""
    if not source:
        raise InputError("SOURCE is empty", "Give a file, a folder or an architecture.")
    arguments = dict(_key_value(text) for text in arch_args)
    for package in allow:
        import_package(package)
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
    plain = SafeConsole()
    return plain if plain.is_terminal else SafeConsole(width=_WIDTH_WITHOUT_TERMINAL)


def say(message: str) -> None:
    """A line for people, on stderr: stdout is kept for tables and JSON."""
    click.echo(printable(message), err=True)


def say_notes(notes: Iterable[str]) -> None:
    """What is worth knowing of a file, a line each."""
    for note in notes:
        say(f"note: {one_line(note)}")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, shown in a terminal alone; yields ``update(done, total)``."""
    stderr = Console(stderr=True)
    if not stderr.is_terminal:
        # A bar that is disabled leaves an empty line.
        yield lambda done, total: None
        return
    bar = Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), console=stderr, transient=True
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
