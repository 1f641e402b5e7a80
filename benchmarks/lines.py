"""Files to which each finished run adds a line, so that a command that was stopped goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import multiprocessing
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torchvision
from rich.progress import track

import we_surgery as ws

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Run = TypeVar("Run")
"""A frozen dataclass of JSON types: what makes a run."""


class Lines:
    """A file to which each finished run adds one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All finished runs; a last line that was cut short by a kill does not count."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, row: Row) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def add_missing(
        self, runs: Sequence[Run], perform: Callable[[Run], Row], label: str, jobs: int = 1
    ) -> None:
        """Performs the runs that have no line, in ``jobs`` processes."""
        rows = self.rows()
        done = {run_of(type(runs[0]), row) for row in rows} if runs else set()
        missing = [run for run in runs if run not in done]
        if not missing:
            return
        source = origin()
        found = _results(missing, perform, jobs)
        for run, measured in track(found, label, total=len(missing)):
            self.append(asdict(run) | source | measured)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else adds lines meanwhile, and the file ends with a complete one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another process is writing {self.path}") from None
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            yield


def run_of(kind: type[Run], row: Row) -> Run:
    """The run of a line."""
    return kind(**{field.name: row[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _results(
    runs: Sequence[Run], perform: Callable[[Run], Row], jobs: int
) -> Iterator[tuple[Run, Row]]:
    act = partial(_with_run, perform)
    if jobs == 1:
        yield from map(act, runs)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(act, runs)


def _with_run(perform: Callable[[Run], Row], run: Run) -> tuple[Run, Row]:
    return run, perform(run)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def origin() -> Row:
    """The commit and the versions that a run is made with."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions = {
        "we_surgery": ws.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    return {"commit": commit or "unknown", "versions": versions}
