"""What the commands share: options, errors with exit codes, the console, progress.

Nothing here may import torch before a command has checked what it was given.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console, RenderableType

from we_surgery._util import shipped
from we_surgery._util.tables import NARROW
from we_surgery._util.text import SafeConsole, printable
from we_surgery._util.version import __version__
from we_surgery.cli.choices import KINDS
from we_surgery.errors import InputError, WESurgeryError, no_such_file

if TYPE_CHECKING:
    from we_surgery.jobs.convert import Source

Command = TypeVar("Command", bound=Callable[..., Any])


FILE = click.Path(readable=False)
"""Text as it was given, a slash at its end included; shells complete files."""

SEED = click.IntRange(0, 2**32 - 1)
"""Seeds that torch takes, also where a command multiplies them."""

# Wide enough for a table's reasons where the output is a file or a pipe.
_WIDTH_WITHOUT_TERMINAL = 140


class SurgeryCommand(click.Command):
    """A command whose errors are two lines, cause and hint, and an exit code."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        click.version_option(__version__)(self)

    def invoke(self, ctx: click.Context) -> Any:
        with telling_errors(ctx), _cleaning_up_when_terminated():
            return super().invoke(ctx)


TRACEBACK_VARIABLE = "WE_SURGERY_TRACEBACK"
"""The environment variable that makes an unexpected error show its traceback."""

_UNEXPECTED = (
    "If the input is valid, please report this, with the traceback that the command shows "
    f"when {TRACEBACK_VARIABLE}=1 is set."
)


@contextmanager
def telling_errors(ctx: click.Context) -> Iterator[None]:
    """Turns an exception into two lines and an exit code."""
    _print_what_cannot_be_encoded()
    try:
        yield
    except WESurgeryError as error:
        _say_error(error.cause, error.cure)
        ctx.exit(error.exit_code)
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    # A model runs the code of its classes on whatever its file holds: anything can come.
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _say_error(f"unexpected {type(error).__name__}: {error}", _UNEXPECTED)
        ctx.exit(1)


def _print_what_cannot_be_encoded() -> None:
    # A name or a bar must not end a command only because the terminal has no such character.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Lets the signals of schedulers and closed terminals leave as exceptions.

    So no temporary file is left.
    """

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    # Windows has no SIGHUP, and under nohup it is ignored.
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [
        n for n in map(signal.Signals.__getitem__, names) if signal.getsignal(n) == signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _say_error(cause: str, cure: str) -> None:
    click.echo(f"error: {one_line(cause)}\n  fix: {one_line(cure)}", err=True)


def one_line(text: str) -> str:
    """Text that may come from a file, so that it neither breaks a line nor steers a terminal."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


_LONGEST_LINE = 1000


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one."""

    def decorate(command: Command) -> Command:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


force_option = click.option("--force", is_flag=True, help="Overwrite existing files.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")

opening_options = options(
    click.option(
        "--arch",
        metavar="NAME",
        help="Architecture of a file that holds only weights: torchvision:NAME, timm:NAME, "
        "transformers:FOLDER or package.module:factory.",
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
        help="Key of the state dict in a wrapped checkpoint, such as state_dict_ema.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="PACKAGE",
        help="Import PACKAGE, with the excitations it registers, and allow its nn.Module classes "
        "in the file. Repeatable.",
    ),
    click.option(
        "--trust",
        is_flag=True,
        help="Unpickle the file without any restriction, which runs its code. Only for files of "
        "your own.",
    ),
)
"""How a file is opened, for a command with arguments of its own."""

source_options = options(click.argument("source", type=FILE), opening_options)
"""Where a model comes from."""


def complete_names(
    folder: Path,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Completes the names of the configs or recipes in a folder of the package, and files."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = [name for name in shipped.names_in(folder) if name.startswith(incomplete)]
        files = FILE.shell_complete(context, parameter, incomplete)
        return [*map(CompletionItem, names), *files]

    return complete


def output_options(what: str) -> Callable[[Command], Command]:
    """The options that say what is written where; ``what`` is what ``-o`` may name."""
    return options(
        click.option(
            "-o",
            "--output",
            type=FILE,
            metavar="FILE",
            help=f"{what} to write; by default beside the input.",
        ),
        click.option(
            "--to",
            type=click.Choice(KINDS),
            help="Kind of file to write; by default that of the input.",
        ),
        force_option,
        json_option,
    )


def make_source(
    source: str,
    arch: str | None,
    arch_args: Sequence[str],
    key: str | None,
    allow: Sequence[str],
    trust: bool,
) -> Source:
    """The options of ``source_options`` as one."""
    check_exists(source)
    arguments = dict(_key_value(text) for text in arch_args)
    from we_surgery._util.imports import import_for
    from we_surgery.jobs.convert import Source

    for package in allow:
        import_for("--allow", package)
    return Source(source, arch, arguments, key, allow=tuple(allow), trust=trust)


def check_exists(source: str) -> None:
    """Raises where a source is neither an architecture nor there, without importing torch."""
    if not source:
        raise InputError("SOURCE is empty", "Give a file, a folder or an architecture.")
    if ":" not in source:
        try:
            Path(source).stat()
        except FileNotFoundError as error:
            raise no_such_file(Path(source)) from error
        except (OSError, ValueError):
            pass  # reading it says what is wrong


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            f"--arch-arg takes KEY=VALUE, not {text!r}", "Write for example num_classes=10."
        )
    import yaml

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


def print_table(content: RenderableType, **options: Any) -> None:
    """A command's result on stdout, for people; ``options`` are those of rich."""
    stdout = console()
    with stdout.capture() as captured:
        stdout.print(content, crop=False, **options)
    # Cells are filled up with spaces, the last ones of a line too.
    stdout.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def table_width() -> int:
    """How wide a table may be that is not ``--wide``."""
    stdout = console()
    return stdout.width if stdout.is_terminal else NARROW


wide_option = click.option(
    "--wide",
    is_flag=True,
    help="Show all columns, one line per weight, with full reasons.",
)


def say_written(*paths: Path, kind: str = "") -> None:
    """Says which files were written."""
    say(f"wrote {', '.join(map(str, paths))}{f' ({kind})' if kind else ''}")


def say(message: str) -> None:
    """A line for people, on stderr: stdout is kept for tables and JSON."""
    click.echo(printable(message), err=True)


def say_notes(notes: Iterable[str]) -> None:
    """What is worth knowing of a file, a line each."""
    for note in notes:
        say(f"note: {one_line(note)}")
