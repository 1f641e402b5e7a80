"""A progress bar with the time that is left, for a run that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(what: str = "measuring") -> Iterator[Bar]:
    """A monitor for any analysis, on stderr: an estimate at the start, a bar in a terminal.

    Example:
        >>> with progress_bar() as monitor:
        ...     maps = location_maps(model, loader, monitor=monitor)
    """
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield Bar(progress, progress.add_task(what, total=None))


class Bar:
    """What :func:`progress_bar` yields; see :class:`we_surgery.analysis.Monitor`."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def start(self, evaluations: int | None, seconds: float | None) -> None:
        """Says how much there is to do and about how long it will take."""
        self._progress.update(self._task, total=evaluations)
        if seconds is not None:
            self._progress.console.print(
                f"{evaluations:,} evaluations, about {duration(seconds)}", highlight=False
            )

    def advance(self, evaluations: int) -> None:
        """Moves the bar."""
        self._progress.advance(self._task, evaluations)


def duration(seconds: float) -> str:
    """``under a second``, ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
