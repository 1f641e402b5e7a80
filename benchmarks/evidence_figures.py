"""Figures of the evidence: curves with bands, and a forest plot of the differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from evidence_arms import Experiment
from evidence_statistics import Comparison
from lines import Row

mpl.use("Agg")
import matplotlib.pyplot as plt

_SHOWN = ("standardize", "lwe", "mwe", "default")
_STYLES = ("-", "--", "-.", ":")
_COLORS = ("0.4", "#0072b2", "#d55e00", "#009e73")
_BAND = 1.96


def draw(
    experiment: Experiment,
    counted: Mapping[str, Mapping[int, Row]],
    compared: Mapping[str, tuple[Comparison, float]],
    path: Path,
) -> None:
    """Curves on the left, the forest plot on the right."""
    mpl.rcParams["svg.hashsalt"] = "evidence"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _curves(left, counted)
    _forest(right, compared)
    figure.suptitle(experiment.title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _curves(axis: plt.Axes, counted: Mapping[str, Mapping[int, Row]]) -> None:
    plain = counted["plain"]
    for arm, style, color in zip(_SHOWN, _STYLES, _COLORS, strict=True):
        runs = counted.get(arm, {})
        seeds = [seed for seed in sorted(runs.keys() & plain.keys()) if not runs[seed]["diverged"]]
        if len(seeds) < 2:
            continue
        values = np.array([runs[seed]["validation_curve"] for seed in seeds])
        values -= np.array([plain[seed]["validation_curve"] for seed in seeds])
        center, half = values.mean(0), _BAND * values.std(0, ddof=1) / len(seeds) ** 0.5
        epochs = np.arange(1, len(center) + 1)
        axis.plot(epochs, center, style, color=color, label=arm)
        axis.fill_between(epochs, center - half, center + half, color=color, alpha=0.15, lw=0)
    axis.axhline(0, color="0.5", lw=0.8)
    axis.set(xlabel="epoch", ylabel="validation accuracy over plain, points")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)


def _forest(axis: plt.Axes, compared: Mapping[str, tuple[Comparison, float]]) -> None:
    names = list(compared)[::-1]
    for place, name in enumerate(names):
        comparison, p = compared[name]
        shown = comparison.verdict(p) in ("gain", "loss")
        axis.plot([comparison.low, comparison.high], [place, place], "-", color="0.3")
        axis.plot(comparison.mean, place, "s", color="0.1", mfc="0.1" if shown else "white")
    axis.axvline(0, color="0.5", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("test accuracy over plain, points; filled: gain or loss")
