"""The lines of finished runs, and the settings that the tuning lines choose."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torchvision
from evidence_arms import EXPERIMENTS, TUNING
from evidence_training import Run

import we_surgery as ws

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


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

    def runs(self) -> set[Run]:
        """What the rows are of."""
        return {run_of(row) for row in self.rows()}

    def append(self, run: Run, measured: Row, source: Row) -> None:
        """Adds a line."""
        experiment = EXPERIMENTS[run.network]
        settings = {
            "images": experiment.images,
            "steps": experiment.steps(run.arm),
            "batch": experiment.batch,
            "optimizer": experiment.optimizer,
            "config": experiment.arms[run.arm].config,
        }
        row = asdict(run) | source | {"settings": settings} | measured
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

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


def run_of(row: Row) -> Run:
    """The run of a line."""
    return Run(**{field.name: row[field.name] for field in fields(Run)})


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


def choose(rows: list[Row], network: str) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each arm whose tuning is complete.

    The best mean validation accuracy wins; of equal ones the smaller values.
    """
    found: dict[str, dict[tuple[float, float], dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row["network"] == network and row["phase"] == "tune":
            setting = row["lr"], row["decay"]
            found[row["arm"]][setting][row["seed"]] = row["validation_accuracy"]
    chosen = {}
    for arm in EXPERIMENTS[network].arms:
        tried = found[arm]
        settings = EXPERIMENTS[network].settings(arm)
        if all(len(tried[setting]) == len(TUNING) for setting in settings):
            chosen[arm] = max(sorted(settings), key=lambda each: mean(tried[each].values()))
    return chosen
