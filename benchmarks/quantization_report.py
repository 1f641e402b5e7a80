"""The tables of docs/quantization.md, from the lines of the runs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
from evidence_statistics import CONFIDENCE, compare, holm, interval
from lines import Lines, Row
from measuring import replace_section, table
from quantization_runs import ARMS, CASES

PAGE = Path(__file__).parents[1] / "docs" / "quantization.md"
BEGIN = "<!-- int8: written by `python benchmarks/quantization.py report`; do not edit -->\n"
END = "<!-- end of int8 -->"
SCHEMES = {
    "static": "static",
    "static_per_tensor": "static, a scale per tensor",
    "dynamic": "dynamic",
    "pt2e": "pt2e",
    "weight_only": "weight-only",
    "qat": "QAT",
}
_COMPARED = ("static", "static_per_tensor", "qat")
_ALL = "all four"
EXCITED = [arm for arm in ARMS if arm != "vanilla"]
EDGES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 1.01)
"""Between them lie the bins of the error."""

ByRun = dict[tuple[str, str, int], Row]


def write_report(results: Path, page: Path = PAGE) -> None:
    """Replaces the marked section of the page."""
    rows = Lines(results / "quantization.jsonl").rows()
    runs = {(row["case"], row["arm"], row["seed"]): row for row in rows}
    parts = [*_accuracies(runs), *_over_vanilla(runs), *_outliers(runs), *_rounding(rows)]
    replace_section(page, BEGIN, END, "\n".join(parts))


def _seeds(runs: ByRun, case: str) -> list[int]:
    """Those that all arms have."""
    found = [{seed for c, a, seed in runs if (c, a) == (case, arm)} for arm in ARMS]
    return sorted(set.intersection(*found))


def _changes(runs: ByRun, case: str, arm: str, scheme: str) -> list[float] | None:
    """Accuracy of the int8 model minus that of the float one, by seed."""
    found = [runs[case, arm, seed]["accuracies"] for seed in _seeds(runs, case)]
    if any(each[scheme] is None for each in found):
        return None
    return [each[scheme] - each["float"] for each in found]


def _shown(values: Sequence[float] | None) -> str:
    if values is None:
        return "refused"
    low, high = interval(np.asarray(values))
    return f"{mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def _accuracies(runs: ByRun) -> Iterator[str]:
    yield (
        f"Accuracy in float, and how many points int8 adds to it, with {CONFIDENCE:.0%} intervals "
        "over the seeds:\n"
    )
    for case, what in CASES.items():
        seeds = _seeds(runs, case)
        rows = []
        for arm in ARMS:
            accuracy = mean(runs[case, arm, seed]["accuracies"]["float"] for seed in seeds)
            changes = [_shown(_changes(runs, case, arm, scheme)) for scheme in SCHEMES]
            rows.append([arm, f"{accuracy:.2f}", *changes])
        yield f"**{what.title}**, {len(seeds)} seeds\n"
        yield table(["", "float", *SCHEMES.values()], rows)


def _over_vanilla(runs: ByRun) -> Iterator[str]:
    differences: dict[tuple[str, str, str], list[float]] = {}
    for case, what in CASES.items():
        for scheme in _COMPARED:
            vanilla = _changes(runs, case, "vanilla", scheme) or []
            for arm in EXCITED:
                own = _changes(runs, case, arm, scheme) or []
                pairs = [a - b for a, b in zip(own, vanilla, strict=True)]
                differences[what.title, arm, scheme] = pairs
                differences.setdefault((_ALL, arm, scheme), []).extend(pairs)
    pooled = {key: compare(pairs) for key, pairs in differences.items() if key[0] == _ALL}
    adjusted = holm({"/".join(key): found.p for key, found in pooled.items()})
    yield (
        "Does int8 take more from an excited network? The change above minus vanilla's of the same "
        f"seed. Intervals of a few seeds are too narrow. The {len(pooled)} p are of all four "
        "networks together, by sign flips, adjusted by Holm's method.\n"
    )
    rows = []
    for title in (*(what.title for what in CASES.values()), _ALL):
        for arm in EXCITED:
            keys = [(title, arm, scheme) for scheme in _COMPARED]
            p = {key: adjusted.get("/".join(key)) for key in keys}
            cells = [
                _shown(differences[key]) + ("" if p[key] is None else f", p {p[key]:.2f}")
                for key in keys
            ]
            rows.append([title, arm, *cells])
    yield table(["", "", *(SCHEMES[scheme] for scheme in _COMPARED)], rows)


def _outliers(runs: ByRun) -> Iterator[str]:
    yield (
        "What the weights look like, over all layers and seeds: the largest absolute value over "
        "the root mean square, and the error of int8.\n"
    )
    rows = []
    for case, what in CASES.items():
        for arm in ARMS:
            found = [
                layer
                for seed in _seeds(runs, case)
                for layer in runs[case, arm, seed]["layers"].values()
            ]
            peaks, per_tensor, per_channel = zip(*found, strict=True)
            errors = [f"{mean(e):.1%}, at most {max(e):.1%}" for e in (per_tensor, per_channel)]
            rows.append([what.title, arm, f"{mean(peaks):.1f}, at most {max(peaks):.1f}", *errors])
    yield table(["", "", "peak", "error, a scale per tensor", "error, per channel"], rows)


def _rounding(rows: Sequence[Row]) -> Iterator[str]:
    bins = losses_by_error(rows)
    yield (
        f"What an error costs. In {len([row for row in rows if 'rounded' in row])} networks the "
        "weights of one layer at a time were rounded to 8, 6, 5, 4, 3 and 2 bits. Points of "
        "accuracy lost, by the error of the layer; the intervals are over the networks.\n"
    )
    found = [
        [f"{low:.0%} to {min(high, 1):.0%}", len(losses), _shown(losses)]
        for (low, high), losses in bins.items()
    ]
    yield table(["error", "networks", "points lost"], found)
    yield f"From {threshold(rows):.0%} on, all intervals lie above zero.\n"


def threshold(rows: Sequence[Row]) -> float:
    """The error from which on accuracy is lost in every bin."""
    found = EDGES[-1]
    for (low, _), losses in reversed(losses_by_error(rows).items()):
        if interval(np.asarray(losses))[0] <= 0:
            break
        found = low
    return found


def losses_by_error(rows: Sequence[Row]) -> dict[tuple[float, float], list[float]]:
    """For each bin of the error, the mean loss of each network that has layers in it."""
    found = {}
    for low, high in pairwise(EDGES):
        chosen = [
            [each["drop"] for each in row["rounded"] if low <= each["channels"] < high]
            for row in rows
            if "rounded" in row
        ]
        losses = [mean(drops) for drops in chosen if drops]
        if len(losses) > 1:
            found[low, high] = losses
    return found
