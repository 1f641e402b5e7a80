"""Tables and learning curves of the evidence."""

from __future__ import annotations

import platform
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl
import torch
from evidence_tasks import interval

mpl.use("Agg")
import matplotlib.pyplot as plt

_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

# Fewer tell nothing of the spread.
_FEWEST_PAIRS = 5

Rows = list[dict[str, Any]]


def write_report(rows: Rows, folder: Path) -> None:
    """``evidence.md``, and ``evidence-TASK.svg`` for each task."""
    lines = [
        "# Does it help? What was measured here",
        "",
        "Written by `python benchmarks/evidence.py`; do not edit. What was run is told at the top",
        "of [evidence_tasks.py](../evidence_tasks.py) and in",
        "[evidence_methods.py](../evidence_methods.py); each run is a line of",
        "[evidence.jsonl](evidence.jsonl). Differences are those of pairs with the same initial",
        "weights and batches, in points of test accuracy, with a 95 % interval by Student's t; a",
        "bold one excludes 0. Of many intervals one in twenty does so by chance. Time is CPU time",
        f"of training over plain, the median of the pairs; torch {torch.__version__}, "
        f"{platform.machine()}, one thread.",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task]
        lines += ["", f"## {task}", "", f"![learning curves](evidence-{task}.svg)"]
        for condition in dict.fromkeys(row["condition"] for row in chosen):
            here = [row for row in chosen if row["condition"] == condition]
            lines += ["", f"### {condition}", "", *_table(here)]
        _curves(chosen, folder / f"evidence-{task}.svg")
    (folder / "evidence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _by_method(rows: Rows) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["method"]][row["seed"]] = row
    return found


def _table(rows: Rows) -> list[str]:
    methods = _by_method(rows)
    plain = methods.get("plain", {})
    lines = [
        "| method | pairs | accuracy | difference to plain | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, runs in methods.items():
        shown = f"{mean(run['accuracy'] for run in runs.values()):.2f}"
        seeds = sorted(runs.keys() & plain.keys())
        difference = time = ""
        if method != "plain" and len(seeds) >= _FEWEST_PAIRS:
            center, half = interval([runs[s]["accuracy"] - plain[s]["accuracy"] for s in seeds])
            difference = f"{center:+.2f} ± {half:.2f}"
            difference = f"**{difference}**" if abs(center) > half else difference
            ratios = [runs[s]["cpu_seconds"] / plain[s]["cpu_seconds"] for s in seeds]
            time = f"{median(ratios):.2f}"
        lines.append(f"| {method} | {len(runs)} | {shown} | {difference} | {time} |")
    return lines


def _curves(rows: Rows, path: Path) -> None:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    columns = min(3, len(conditions))
    lines = -(-len(conditions) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(conditions) :]:
        axis.remove()
    for axis, condition in zip(axes.flat, conditions, strict=False):
        here = _by_method([row for row in rows if row["condition"] == condition])
        colors = mpl.colormaps["cividis"](torch.linspace(0, 0.85, len(here)).numpy())
        for (method, runs), style, color in zip(here.items(), _STYLES, colors, strict=False):
            curve = [
                mean(values) for values in zip(*(r["curve"] for r in runs.values()), strict=True)
            ]
            shares = [(n + 1) / len(curve) for n in range(len(curve))]
            axis.plot(shares, curve, linestyle=style, color=color, label=method)
        axis.set_title(condition, fontsize=10)
        axis.set_xlabel("share of training")
        axis.set_ylabel("test accuracy, %")
        axis.legend(fontsize=7)
    mpl.rcParams["svg.hashsalt"] = "evidence"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
