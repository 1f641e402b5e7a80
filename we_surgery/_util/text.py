"""Text for terminals; parts of it may come from a hostile file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment


def printable(text: str) -> str:
    r"""The text with invisible characters escaped, except for line ends.

    Example:
        >>> printable("\x1b[2J")
        '\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class SafeConsole(Console):
    """A console that escapes control characters in texts."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(
            *(printable(o) if isinstance(o, str) else _Printable(o) for o in objects), **options
        )


@dataclass
class _Printable:
    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
