"""The measurements as pictures, legible in print and without colour vision.

Colour never says something alone: lines differ in style and marker, bars in hatching, and
negative cells of the maps, whose colours diverge from white at 0, have a dash.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from we_surgery.analysis.curves import CurveDrawing
from we_surgery.analysis.learning import LearningCurves
from we_surgery.analysis.removal import GRANULARITIES
from we_surgery.analysis.results import Ablation, Result, Row
from we_surgery.analysis.sweeps import Sweep
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
_GREY = "#999999"
_STYLES = (("-", "#1b3a6b"), ("--", "#c4661f"), (":", "#5f5f5f"))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = {"lowest": ("#c9d7ea", "//"), "random": ("#e6e6e6", ".."), "highest": ("#1b3a6b", "")}
_UNITS = {"accuracy": "accuracy", "log_likelihood": "mean log likelihood", "metric_fn": "metric"}


def check_pictures() -> None:
    """An InputError, before a long run, if matplotlib is missing."""
    _matplotlib("matplotlib")


def draw(result: Result) -> Figure:
    """The result of an analysis as a matplotlib figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    drawers: dict[str, Callable[[Any], Figure]] = {
        "magnitude": _magnitude,
        "location": _locations,
        "multipliers": _validity,
        "prune": _pruning,
        "sensitivity": _sparsity if "strength" in result.rows[0] else _differences,
        "curve": _curves,
        "learning_curves": _learning,
    }
    with _style():
        return drawers[result.analysis](result)


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


def _by(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    """Rows by one of their entries."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _styled(number: int) -> dict[str, Any]:
    """How the line of a variant is drawn."""
    style, color = _STYLES[number % len(_STYLES)]
    marker = _MARKERS[number % len(_MARKERS)]
    return {"linestyle": style, "marker": marker, "color": color, "markersize": 4}


def _magnitude(result: Ablation) -> Figure:
    title = f"One weight of each of {len(result.layers)} conv layers at zero"
    figure, axes = _axes(3.2, title)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    positions = [row["percentile"] for row in result.rows]
    drops = [row["drop"] for row in result.rows]
    axes.plot(positions, drops, **{**_styled(0), "markersize": 2.5})
    axes.set_xlabel("percentile of weight magnitude in each layer")
    axes.set_ylabel(f"D, decrease in {_UNITS[result.score]}")
    return figure


def _locations(result: Ablation) -> Figure:
    maps = result.kernel_maps()
    columns = min(len(maps), 6)
    rows = math.ceil(len(maps) / columns)
    figure = _figure(1.35 * columns + 1.1, 1.55 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    limit = max(abs(row["drop"]) for row in result.rows) or 1
    image = None
    for axes, (layer, one) in zip(grid.flat, maps.items(), strict=False):
        image = axes.imshow(one.drops, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for row, drops in enumerate(one.drops):
            below = [column for column, drop in enumerate(drops) if drop < 0]
            axes.plot(below, [row] * len(below), "k_", markersize=3)
        axes.set_title(layer, fontsize=7)
        axes.set_xticks(range(len(one.in_channels)), one.in_channels, fontsize=5)
        axes.set_yticks(range(len(one.out_channels)), one.out_channels, fontsize=5)
        axes.tick_params(length=1.5, pad=1.5)
        axes.spines[:].set_visible(False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30)
    bar.set_label(f"D, decrease in {_UNITS[result.score]}")
    figure.supxlabel("input channel", fontsize=8)
    figure.supylabel("output channel", fontsize=8)
    return figure


def _validity(result: Ablation) -> Figure:
    share = result.rows[0]["share"]
    amount = "One unit" if share is None else f"{share:.0%}"
    figure, axes = _axes(3.3, f"{amount} of each layer at zero", width=5.6)
    by_end = _by(result.rows, "end")
    ends = [end for end in _HATCHES if end in by_end]
    names = [name for name in GRANULARITIES if name in _by(result.rows, "granularity")]
    for index, end in enumerate(ends):
        color, hatch = _HATCHES[end]
        axes.bar(
            [at + 0.26 * (index - (len(ends) - 1) / 2) for at in range(len(names))],
            [result.mean_drop(granularity=name, end=end) for name in names],
            0.24,
            color=color,
            hatch=hatch,
            edgecolor="#222222",
            linewidth=0.8,
            label=f"{end} multiplier" if end != "random" else "random choice (mean, each draw)",
        )
    draws = by_end.get("random", [])
    place = 0.26 * ((ends.index("random") if draws else 0) - (len(ends) - 1) / 2)
    at = [names.index(row["granularity"]) + place for row in draws]
    axes.plot(at, [row["drop"] for row in draws], "k_", markersize=7)
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylabel(f"D, decrease in {_UNITS[result.score]}")
    axes.legend(fontsize=7)
    return figure


def _pruning(result: Ablation) -> Figure:
    figure, axes = _axes(3.3, f"{len(result.layers)} layers pruned, no training after")
    axes.axhline(result.baseline, color=_GREY, linewidth=0.8, label="not pruned")
    for number, (criterion, rows) in enumerate(_by(result.rows, "criterion").items()):
        rows.sort(key=lambda row: row["share"])
        shares = [100 * row["share"] for row in rows]
        metrics = [row["metric"] for row in rows]
        axes.plot(shares, metrics, **_styled(number), label=_CRITERIA[criterion])
    axes.set_xlabel("kernels removed in each layer, %")
    axes.set_ylabel(_UNITS[result.score])
    axes.legend(fontsize=7)
    return figure


_CRITERIA = {
    "multiplier": "lowest multipliers first",
    "magnitude": "smallest weights first",
    "random": "at random",
}


def _differences(result: Sweep) -> Figure:
    summary = [row for row in result.summary() if row["variant"] != result.baseline]
    figure, axes = _axes(0.45 * len(summary) + 1.4, result.title, width=6.4)
    seeds = sorted(_by(result.rows, "seed"))
    runs = _by([row for row in result.rows if row["difference"] is not None], "variant")
    axes.axvline(0, color=_GREY, linewidth=0.8)
    open_marks: dict[str, Any] = {"color": "#c4661f", "markersize": 5, "markerfacecolor": "none"}
    for at, row in enumerate(summary):
        for run in runs.get(row["variant"], []):
            marker = _MARKERS[seeds.index(run["seed"]) % len(_MARKERS)]
            axes.plot(run["difference"], at, marker, **open_marks)
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


def _sparsity(result: Sweep) -> Figure:
    figure, axes = _axes(3.3, "Each point a strength: means large, runs small")
    runs = [row for row in result.rows if row["metric"] is not None]
    for number, (name, rows) in enumerate(_by(runs, "variant").items()):
        style = _styled(number)
        small = {**style, "linestyle": "", "markersize": 3, "markerfacecolor": "none", "alpha": 0.7}
        kept = [100 * (1 - row["sparsity"]) for row in rows]
        axes.plot(kept, [row["metric"] for row in rows], **small)
        means = [
            row for row in result.summary() if row["variant"] == name and row["mean"] is not None
        ]
        means.sort(key=lambda row: row["strength"])
        kept = [100 * (1 - row["sparsity"]) for row in means]
        axes.plot(kept, [row["mean"] for row in means], **style, label=name)
    axes.set_xlabel("weights that are left, %")
    axes.set_ylabel(_UNITS[result.score])
    axes.legend(fontsize=7)
    return figure


def _curves(drawing: CurveDrawing) -> Figure:
    figure = _figure(7.6, 3.6)
    panels = figure.subplots(1, 2)
    excited, gains = panels
    for number, (name, rows) in enumerate(_by(drawing.rows, "curve").items()):
        weights = [row["weight"] for row in rows]
        style = {**_styled(number), "markersize": 3.5, "markevery": max(len(rows) // 8, 1)}
        for axes, what in zip(panels, ("excited", "gain"), strict=True):
            axes.plot(weights, [row[what] for row in rows], **style, label=name)
    ends = [pick(row["weight"] for row in drawing.rows) for pick in (min, max)]
    excited.plot(ends, ends, color=_GREY, linewidth=0.8)
    gains.axhline(1, color=_GREY, linewidth=0.8)
    for axes, label in zip(panels, ("excited weight", "gain of its gradient"), strict=True):
        axes.set_xlabel("weight")
        axes.set_ylabel(label)
    excited.legend(fontsize=6)
    seen = f"epsilon {drawing.epsilon:g}" if drawing.relative else "of the weight itself"
    excited.set_title(f"MWE, {seen}", loc="left")
    return figure


def _learning(curves: LearningCurves) -> Figure:
    title = "Validation with a marker, training without; a line per variant"
    figure, axes = _axes(3.6, title, width=6.4)
    for number, (name, rows) in enumerate(_by(curves.rows, "variant").items()):
        epochs = _by(rows, "epoch")
        style = _styled(number)
        thin = {**style, "marker": "", "linewidth": 0.8, "alpha": 0.6}
        for what, look in (("validation", {**style, "label": name}), ("training", thin)):
            means = [fmean(row[what] for row in own) for own in epochs.values()]
            axes.plot(list(epochs), means, **look)
    if curves.goal is not None:
        axes.axhline(curves.goal, color=_GREY, linewidth=0.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("metric")
    axes.legend(fontsize=7)
    return figure
