"""The third-party part of the zoo's page: one line for each library."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from zoo_libraries import LIBRARIES

Row = Mapping[str, Any]

COMMAND = "python benchmarks/zoo.py --third-party"


def library_versions() -> dict[str, str]:
    """The versions of what is installed of the libraries, of torch and of Python."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    distributions = packages_distributions()
    for source, package in LIBRARIES.items():
        try:
            found[source] = version(distributions.get(package, [package])[0])
        except PackageNotFoundError:
            continue
    return found


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The last row of each finished model, and the versions of the last run."""
    rows: dict[str, Row] = {}
    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "versions" in entry:
            versions = entry["versions"]
        elif "name" in entry:
            rows[entry["name"]] = entry
    return list(rows.values()), versions


def third_party_part(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The section of the page."""
    passed = sum(row["passed"] for row in rows)
    plain = sum(row["plain"] for row in rows)
    alone: Counter[str] = Counter()
    for row in rows:
        alone.update(row["plain_alone"])
    pickled = sum(row["pickles"] for row in rows)
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    times = [row["read_s"] / row["forward_s"] for row in rows if row["forward_s"]]
    return "\n".join(
        (
            "## Other libraries\n",
            f"Written by `{COMMAND}` (libraries: `pip install '.[zoo]'`); do not edit. "
            f"{len(rows)} models made small, with random weights, that run on a CPU in both modes; "
            f"{shown}; one thread. Every "
            "model's row is in [zoo_third_party.jsonl](../benchmarks/results/"
            "zoo_third_party.jsonl). Each has to keep every promise at the top of "
            "[zoo_check.py](../benchmarks/zoo_check.py), also the last four (generators, fake "
            "tensors, state dicts, files), which the run above did not check yet.\n",
            f"{passed} of {len(rows)} models pass ({passed / max(1, len(rows)):.1%}). "
            f"{pickled} can be pickled, and were saved and loaded as modules too.\n",
            _table(
                ("library", "models", "pass", "weights", "converted", "plain left alone"),
                [_line(source, rows) for source in LIBRARIES],
            ),
            f"In {sum(not row['converted'] for row in rows if row['passed'])} of them no weight is "
            "converted: adapters over a frozen model, GPT-2's `x @ W` layers, parametrized ones.\n",
            f"Reading took {statistics.median(times or [0.0]):.1f} forward passes (median).\n",
            "### Plain layers left alone\n",
            f"Of {plain:,} weights of torch's own conv and linear layers "
            f"{sum(alone.values()):,} ({_share(alone, plain)}) are left alone:\n",
            _table(
                ("reason", "weights", "share", "models"),
                [
                    (reason, count, f"{count / plain:.1%}", _models(rows, reason))
                    for reason, count in alone.most_common()
                ],
            ),
            "### Models that do not pass\n",
            _table(
                ("model", "cause"),
                [(row["name"], _cell(row["cause"])) for row in rows if not row["passed"]]
                or [("none", "")],
            ),
        )
    )


def _line(source: str, rows: Sequence[Row]) -> tuple[object, ...]:
    own = [row for row in rows if row["name"].startswith(f"{source}:")]
    count: Callable[[str], int] = lambda key: sum(row[key] for row in own)  # noqa: E731
    left = sum(sum(row["plain_alone"].values()) for row in own)
    share = f"{left} of {count('plain')}"
    return (source, len(own), count("passed"), count("weights"), count("converted"), share)


def _share(alone: Counter[str], plain: int) -> str:
    return f"{sum(alone.values()) / max(1, plain):.1%}"


def _share(alone: Counter[str], plain: int) -> str:
    return f"{sum(alone.values()) / max(1, plain):.1%}"


def _models(rows: Sequence[Row], reason: str) -> int:
    return sum(reason in row["plain_alone"] for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
