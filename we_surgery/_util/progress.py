"""Progress of long runs: one type of callback, and a bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all, which are 0 where that is not known."""


@contextmanager
def progress_bar(what: str = "measuring", unit: str = "evaluations") -> Iterator[Progress]:
    """A progress callback that draws a bar on stderr, in a terminal.

    After the first step it says how long the run takes; not with ``unit=""``.

    Example:
        >>> with progress_bar() as progress:
        ...     maps = location_maps(model, loader, progress=progress)
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=None)
    start = time.perf_counter()

    def update(done: int, total: int) -> None:
        nonlocal start
        if done == 0:
            start = time.perf_counter()
        bar.update(task, completed=done, total=total or None)
        if unit and done == 1 and total:
            seconds = timedelta(seconds=round(total * (time.perf_counter() - start)))
            console.print(f"{total:,} {unit}, about {seconds} (h:mm:ss)", highlight=False)

    if not console.is_terminal:
        yield update  # a bar that is disabled would leave an empty line
        return
    with bar:
        yield update
