"""The measurements as pictures, legible in print and without colour vision.

Colour never says something alone: lines differ in style and marker, bars in hatching, and
negative cells of the maps, whose colours diverge from white at 0, have a dash.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from we_surgery.analysis.curves import CurveDrawing
from we_surgery.analysis.multipliers import GRANULARITIES
from we_surgery.analysis.results import (
    LocationMaps,
    MagnitudeCurve,
    MultiplierValidity,
    PruningCurve,
    Result,
)
from we_surgery.analysis.run_results import LearningCurves, SparseTraining, Sweep
from we_surgery.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "we_surgery",
}
_STYLES = (("-", "o", "#1b3a6b"), ("--", "s", "#c4661f"), (":", "^", "#5f5f5f"))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = {"lowest": ("#c9d7ea", "//"), "random": ("#e6e6e6", ".."), "highest": ("#1b3a6b", "")}
_UNITS = {"accuracy": "accuracy", "log_likelihood": "mean log likelihood", "metric_fn": "metric"}


def check_pictures() -> None:
    """An InputError, before a long run, if matplotlib is missing."""
    _matplotlib("matplotlib")


def draw(result: Result) -> Figure:
    """A measurement as a matplotlib figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    drawers: dict[type, Callable[[Any], Figure]] = {
        MagnitudeCurve: _magnitude,
        LocationMaps: _locations,
        MultiplierValidity: _validity,
        PruningCurve: _pruning,
        Sweep: _sweep,
        SparseTraining: _sparse_training,
        CurveDrawing: _curves,
        LearningCurves: _learning,
    }
    with _style():
        return drawers[type(result)](result)


def render(result: Result, kind: str) -> bytes:
    """A measurement as a file; the same result gives the same bytes.

    Args:
        result: what an analysis returned.
        kind: ``png`` or ``svg``.
    """
    figure = draw(result)
    buffer = io.BytesIO()
    with _style():
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _style() -> AbstractContextManager[None]:
    found: AbstractContextManager[None] = _matplotlib("matplotlib").rc_context(_SETTINGS)
    return found


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            "pictures need matplotlib, which is not installed",
            "Install it with `pip install matplotlib`, or leave pictures out "
            "(--no-picture; `picture=False`).",
        ) from error


def _figure(width: float, height: float) -> Figure:
    figure: Figure = _matplotlib("matplotlib.figure").Figure((width, height), layout="constrained")
    return figure


def _axes(height: float, title: str, width: float = 5.2) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    return figure, axes


def _magnitude(curve: MagnitudeCurve) -> Figure:
    title = f"One weight of each of {len(curve.layers)} conv layers at zero"
    figure, axes = _axes(3.2, title)
    axes.axhline(0, color="#999999", linewidth=0.8)
    style, marker, color = _STYLES[0]
    axes.plot(curve.positions, curve.drops, style, marker=marker, markersize=2.5, color=color)
    axes.set_xlabel("percentile of weight magnitude in each layer")
    axes.set_ylabel(f"D, decrease in {_UNITS[curve.score]}")
    return figure


def _locations(maps: LocationMaps) -> Figure:
    columns = min(len(maps.maps), 6)
    rows = math.ceil(len(maps.maps) / columns)
    figure = _figure(1.35 * columns + 1.1, 1.55 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    limit = max(abs(value) for one in maps.maps for line in one.drops for value in line)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(maps.maps):
            axes.set_visible(False)
            continue
        one = maps.maps[index]
        image = axes.imshow(one.drops, cmap="RdBu_r", vmin=-(limit or 1), vmax=limit or 1)
        for row, line in enumerate(one.drops):
            columns_below = [column for column, value in enumerate(line) if value < 0]
            axes.plot(columns_below, [row] * len(columns_below), "k_", markersize=3)
        axes.set_title(one.layer, fontsize=7)
        axes.set_xticks(range(len(one.in_channels)), one.in_channels, fontsize=5)
        axes.set_yticks(range(len(one.out_channels)), one.out_channels, fontsize=5)
        axes.tick_params(length=1.5, pad=1.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30)
    bar.set_label(f"D, decrease in {_UNITS[maps.score]}")
    figure.supxlabel("input channel", fontsize=8)
    figure.supylabel("output channel", fontsize=8)
    return figure


def _validity(validity: MultiplierValidity) -> Figure:
    amount = "One unit" if validity.share is None else f"{validity.share:.0%}"
    figure, axes = _axes(3.3, f"{amount} of each layer at zero", width=5.6)
    found = {row.granularity for row in validity.measurements}
    names = [name for name in GRANULARITIES if name in found]
    ends = [end for end in _HATCHES if any(row.end == end for row in validity.measurements)]
    for index, end in enumerate(ends):
        color, hatch = _HATCHES[end]
        places = [at + 0.26 * (index - (len(ends) - 1) / 2) for at in range(len(names))]
        drops = [validity.drop(name, end) for name in names]
        axes.bar(
            places,
            drops,
            0.24,
            color=color,
            hatch=hatch,
            edgecolor="#222222",
            linewidth=0.8,
            label=f"{end} multiplier" if end != "random" else "random choice (mean, each draw)",
        )
        for at, name in zip(places, names, strict=True):
            if end == "random":
                draws = [
                    row.drop
                    for row in validity.measurements
                    if (row.granularity, row.end) == (name, end)
                ]
                axes.plot([at] * len(draws), draws, "k_", markersize=7)
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel(f"D, decrease in {_UNITS[validity.score]}")
    axes.legend(fontsize=7)
    return figure


def _pruning(curve: PruningCurve) -> Figure:
    figure, axes = _axes(3.3, f"{len(curve.layers)} layers pruned, no training after")
    axes.axhline(curve.baseline, color="#999999", linewidth=0.8, label="not pruned")
    criteria = list(dict.fromkeys(row.criterion for row in curve.measurements))
    for criterion, (style, marker, color) in zip(criteria, _STYLES, strict=False):
        rows = sorted(
            (row for row in curve.measurements if row.criterion == criterion),
            key=lambda row: row.share,
        )
        axes.plot(
            [100 * row.share for row in rows],
            [row.metric for row in rows],
            style,
            marker=marker,
            markersize=4,
            color=color,
            label=_CRITERIA[criterion],
        )
    axes.set_xlabel("kernels removed in each layer, %")
    axes.set_ylabel(_UNITS[curve.score])
    axes.legend(fontsize=7)
    return figure


_CRITERIA = {
    "multiplier": "lowest multipliers first",
    "magnitude": "smallest weights first",
    "random": "at random",
}


def _sweep(result: Sweep) -> Figure:
    summary = [row for row in result.summary() if row["variant"] != result.baseline]
    figure, axes = _axes(0.45 * len(summary) + 1.4, result.title, width=6.4)
    seeds = sorted({row.seed for row in result.runs})
    axes.axvline(0, color="#999999", linewidth=0.8)
    for at, row in enumerate(summary):
        for run in result.runs:
            if run.variant == row["variant"] and run.difference is not None:
                marker = _MARKERS[seeds.index(run.seed) % len(_MARKERS)]
                axes.plot(
                    run.difference,
                    at,
                    marker,
                    color="#c4661f",
                    markersize=5,
                    markerfacecolor="none",
                )
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [at, at], color="#1b3a6b", linewidth=1.2)
        if row["difference"] is not None:
            ends = [at - 0.28, at + 0.28]
            axes.plot([row["difference"]] * 2, ends, color="#1b3a6b", linewidth=2.2)
        if row["failed"]:
            axes.annotate(
                f"{row['failed']} of {row['runs']} failed",
                (0.99, at),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(range(len(summary)), [row["variant"] for row in summary])
    axes.set_ylim(len(summary) - 0.5, -0.5)
    axes.set_xlabel(
        f"{_UNITS[result.score]} minus that of {result.baseline}\n"
        "(marks: runs of one seed; bar: mean; line: 95 % interval)"
    )
    return figure


def _sparse_training(result: SparseTraining) -> Figure:
    figure, axes = _axes(3.3, "Each point a strength: means large, runs small")
    names = list(dict.fromkeys(row.variant for row in result.runs))
    for name, (style, marker, color) in zip(names, _STYLES, strict=False):
        own = [row for row in result.runs if row.variant == name]
        points = []
        for strength in sorted({row.strength for row in own}):
            rows = [row for row in own if row.strength == strength]
            kept = [100 * (1 - row.sparsity) for row in rows]
            metrics = [row.metric for row in rows]
            axes.plot(
                kept, metrics, marker, color=color, markersize=3, markerfacecolor="none", alpha=0.7
            )
            points.append((sum(kept) / len(kept), sum(metrics) / len(metrics)))
        axes.plot(
            *zip(*points, strict=True), style, marker=marker, color=color, markersize=5, label=name
        )
    axes.set_xlabel("weights that are left, %")
    axes.set_ylabel(_UNITS[result.score])
    axes.legend(fontsize=7)
    return figure


def _curves(drawing: CurveDrawing) -> Figure:
    figure = _figure(7.6, 3.6)
    excited, gains = figure.subplots(1, 2)
    names = list(dict.fromkeys(point.curve for point in drawing.points))
    for index, name in enumerate(names):
        own = [point for point in drawing.points if point.curve == name]
        weights = [point.weight for point in own]
        style, _, color = _STYLES[index % len(_STYLES)]
        marker = {"marker": _MARKERS[index % len(_MARKERS)], "markevery": max(len(own) // 8, 1)}
        for axes, values in (
            (excited, [point.excited for point in own]),
            (gains, [point.gain for point in own]),
        ):
            axes.plot(weights, values, style, color=color, markersize=3.5, label=name, **marker)
    ends = [min(p.weight for p in drawing.points), max(p.weight for p in drawing.points)]
    excited.plot(ends, ends, color="#999999", linewidth=0.8)
    gains.axhline(1, color="#999999", linewidth=0.8)
    for axes, label in ((excited, "excited weight"), (gains, "gain of its gradient")):
        axes.set_xlabel("weight")
        axes.set_ylabel(label)
    excited.legend(fontsize=6)
    seen = f"epsilon {drawing.epsilon:g}" if drawing.relative else "of the weight itself"
    excited.set_title(f"MWE, {seen}", loc="left")
    return figure


def _learning(curves: LearningCurves) -> Figure:
    figure, axes = _axes(3.6, "Validation with a marker, training without; a line per variant", 6.4)
    for index, name in enumerate(dict.fromkeys(run.variant for run in curves.runs)):
        runs = [run for run in curves.runs if run.variant == name]
        epochs = range(1, 1 + min(len(run.validation) for run in runs))
        style, _, color = _STYLES[index % len(_STYLES)]
        marker = _MARKERS[index % len(_MARKERS)]
        validation = [sum(r.validation[e - 1] for r in runs) / len(runs) for e in epochs]
        training = [sum(r.training[e - 1] for r in runs) / len(runs) for e in epochs]
        axes.plot(epochs, validation, style, color=color, marker=marker, markersize=4, label=name)
        axes.plot(epochs, training, style, color=color, linewidth=0.8, alpha=0.6)
    if curves.goal is not None:
        axes.axhline(curves.goal, color="#999999", linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel(_UNITS[curves.score])
    axes.legend(fontsize=7)
    return figure
