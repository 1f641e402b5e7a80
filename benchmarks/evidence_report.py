"""Tables and figures of the evidence, from the lines alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from evidence_arms import COUNTED, EXPERIMENTS, TUNING, Arm
from evidence_figures import draw
from evidence_lines import choose
from evidence_statistics import CONFIDENCE, Comparison, compare, holm
from lines import Lines, Row
from measuring import replace_section

_ROOT = Path(__file__).parents[1]
PAGE = _ROOT / "docs" / "does_it_help.md"
README = _ROOT / "README.md"
BEGIN = "<!-- evidence: written by `python benchmarks/evidence.py report`; do not edit -->\n"
END = "<!-- end of evidence -->"

FEWEST_PAIRS = 5
"""Fewer say nothing about the spread."""

_SIMPLER = ("longer", "wider", "standardize", "dropout", "decay")
SECOND_FAMILY = [(arm, other) for arm in ("lwe", "mwe", "default") for other in _SIMPLER] + [
    ("mwe", "mwe-gradient"),
    ("lwe", "lwe-raw"),
    ("lwe+mwe", "lwe"),
    ("default", "lwe"),
]
"""What is it that gains or loses: the arm, and what it is compared with."""

_IN_README = ("standardize", "lwe", "mwe", "default")

ByArm = dict[str, dict[int, Row]]


def write_report(results: Path, page: Path = PAGE, readme: Path = README) -> None:
    """Replaces the marked sections of the pages, and draws a figure for each network."""
    parts = []
    found = {}
    for network in EXPERIMENTS:
        rows = Lines(results / f"evidence_{network}.jsonl").rows()
        if rows:
            found[network] = by_arm(rows)
            parts.append(_section(network, rows, results))
    replace_section(readme, BEGIN, END, _short_table(found))
    public = results / "evidence_public.json"
    if public.exists():
        parts.append(_public_section(json.loads(public.read_text(encoding="utf-8"))))
    replace_section(page, BEGIN, END, "\n".join(parts) or "No run has been made yet.\n")


def _section(network: str, rows: list[Row], results: Path) -> str:
    experiment = EXPERIMENTS[network]
    title = f"### {experiment.title}\n"
    tuned = choose(rows, network)
    wanted = sum(len(experiment.settings(arm)) for arm in experiment.arms) * len(TUNING)
    done = sum(
        row["phase"] == "tune" and (row["lr"], row["decay"]) in experiment.settings(row["arm"])
        for row in rows
    )
    lines = [title]
    if done < wanted:
        lines.append(f"Incomplete: {done} of {wanted} tuning runs are done.\n")
    counted = by_arm(rows)
    if len(counted.get("plain", {})) < FEWEST_PAIRS:
        lines.append(f"Fewer than {FEWEST_PAIRS} pairs are done, so nothing is compared yet.\n")
        return "\n".join(lines)
    compared = compare_with_plain(counted)
    figure = f"evidence_{network}.svg"
    draw(experiment, counted, compared, results / figure)
    lines += [
        f"`python benchmarks/evidence.py run {network} --arms plain ARM --output FOLDER` repeats a",
        "row.\n",
        f"![curves and differences](../benchmarks/results/{figure})\n",
        *_main_table(experiment.arms, counted, compared, tuned),
        "",
        *_other_table(experiment.arms, counted),
        "",
        *_second_table(counted),
        "",
    ]
    return "\n".join(lines)


def _short_table(found: Mapping[str, ByArm]) -> str:
    """The arms that most people ask for, for networks with enough pairs."""
    lines = [
        "| network | pairs | plain, % | standardization alone | LWE | MWE | default mode |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for network, counted in found.items():
        plain = counted.get("plain", {})
        if len(plain) < FEWEST_PAIRS:
            continue
        compared = compare_with_plain(counted)
        accuracy = mean(row["test_accuracy"] for row in plain.values())
        cells = [EXPERIMENTS[network].title, str(len(plain)), f"{accuracy:.2f}"]
        for arm in _IN_README:
            cells.append("")
            if arm in compared:
                comparison, p = compared[arm]
                verdict = comparison.verdict(p)
                emphasis = "**" if verdict in ("gain", "loss") else ""
                cells[-1] = f"{emphasis}{_shown(comparison)}{emphasis}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _public_section(found: Row) -> str:
    lines = [
        "### Beside the authors' layers\n",
        "The batch-norm ResNet with plain layers that compute what the public code computes, and",
        "with `attach`, in float64, from the same weights, on the same batches:",
        "`python benchmarks/evidence_public.py`.\n",
        "| arm | steps | mean loss of the last epoch | accuracy | largest difference of a loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in found["runs"]:
        losses = " and ".join(f"{curve[-1]:.8f}" for curve in run["losses"])
        accuracies = " and ".join(f"{accuracy:.2f}" for accuracy in run["test_accuracy"])
        cells = [f"`{run['arm']}`", str(run["steps"]), losses, accuracies]
        lines.append(f"| {' | '.join(cells)} | {run['largest_difference']:.1e} |")
    return "\n".join([*lines, ""])


def by_arm(rows: list[Row]) -> ByArm:
    """The counted runs by arm and seed."""
    found: ByArm = {}
    for row in rows:
        if row["phase"] == "count" and row["seed"] in COUNTED:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def differences(first: Mapping[int, Row], second: Mapping[int, Row], name: str) -> list[float]:
    """Those of the pairs that both arms have."""
    return [first[seed][name] - second[seed][name] for seed in sorted(first.keys() & second.keys())]


def compare_with_plain(counted: ByArm) -> dict[str, tuple[Comparison, float]]:
    """Each arm's comparison and adjusted p."""
    return _family(
        {arm: (counted[arm], counted["plain"]) for arm in counted if arm != "plain"},
    )


def _family(
    pairs: Mapping[str, tuple[Mapping[int, Row], Mapping[int, Row]]],
) -> dict[str, tuple[Comparison, float]]:
    found = {}
    for name, (first, second) in pairs.items():
        values = differences(first, second, "test_accuracy")
        if len(values) >= FEWEST_PAIRS:
            found[name] = compare(values)
    adjusted = holm({name: comparison.p for name, comparison in found.items()})
    return {name: (comparison, adjusted[name]) for name, comparison in found.items()}


def _shown(comparison: Comparison) -> str:
    return f"{comparison.mean:+.2f} [{comparison.low:+.2f}, {comparison.high:+.2f}]"


def _main_table(
    arms: Mapping[str, Arm],
    counted: ByArm,
    compared: Mapping[str, tuple[Comparison, float]],
    tuned: Mapping[str, tuple[float, float]],
) -> list[str]:
    level = (1 - CONFIDENCE) / max(1, len(compared))
    lines = [
        f"Differences are in points of test accuracy over plain, with {CONFIDENCE:.0%} intervals.",
        "p is adjusted over the arms. The last column is what the pairs could see, at p = 0.05 and",
        "at Holm's first step.\n",
        "| arm | | pairs | rate, decay | accuracy | difference | p | verdict | could see |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in _ordered(arms, counted):
        accuracy = mean(row["test_accuracy"] for row in runs.values())
        cells = [f"`{arm}`", arms[arm].title, _pairs(runs), _setting(tuned, arm), f"{accuracy:.2f}"]
        if arm in compared:
            comparison, p = compared[arm]
            sight = f"{comparison.detectable(0.05):.2f}, {comparison.detectable(level):.2f}"
            cells += [_shown(comparison), f"{p:.4f}", f"**{comparison.verdict(p)}**", sight]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ordered(arms: Mapping[str, Arm], counted: ByArm) -> list[tuple[str, dict[int, Row]]]:
    return [(arm, counted[arm]) for arm in arms if arm in counted]


def _pairs(runs: Mapping[int, Row]) -> str:
    missing = "" if len(runs) == len(COUNTED) else f" of {len(COUNTED)}, incomplete"
    diverged = sum(row["diverged"] for row in runs.values())
    return f"{len(runs)}{missing}" + (f", {diverged} diverged" if diverged else "")


def _setting(tuned: Mapping[str, tuple[float, float]], arm: str) -> str:
    return "{:g}, {:g}".format(*tuned[arm]) if arm in tuned else "not tuned"


def _other_table(arms: Mapping[str, Arm], counted: ByArm) -> list[str]:
    plain = counted["plain"]
    target = mean(row["validation_curve"][-1] for row in plain.values())
    measures: dict[str, Callable[[Row], float]] = {
        "test loss": lambda row: _number(row["test_loss"]),
        "ECE": lambda row: _number(row["test_ece"]),
        "gap": lambda row: row["train_accuracy"] - row["test_accuracy"],
        "roughness": roughness,
        "norm of raw weights": lambda row: _number(row["raw_norm"][-1]),
        "change of weights": lambda row: _number(row["weight_change"][min(1, _last(row))]),
    }
    lines = [
        "Means of the runs; nan where one diverged. Epochs: the median until the validation curve",
        "reaches plain's mean final value; inf is never. Norm: of all weights that the optimizer",
        "moves, at the end. Change of weights: of the (excited) weights in the second epoch, over",
        "their norm. Time: CPU time over plain's, beside other processes.\n",
        f"| arm | {' | '.join(measures)} | epochs | time |",
        f"| --- |{' --- |' * (len(measures) + 2)}",
    ]
    for arm, runs in _ordered(arms, counted):
        cells = [
            f"{mean(measure(row) for row in runs.values()):.3f}" for measure in measures.values()
        ]
        epochs = median(epochs_to(row["validation_curve"], target) for row in runs.values())
        ratios = [
            runs[seed]["cpu_seconds"] / plain[seed]["cpu_seconds"]
            for seed in runs.keys() & plain.keys()
        ]
        time = f"{median(ratios):.2f}" if ratios else ""
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {epochs:g} | {time} |")
    return lines


def _last(row: Row) -> int:
    return len(row["weight_change"]) - 1


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def roughness(row: Row) -> float:
    """The sum of the falls of the validation curve, in points."""
    curve = row["validation_curve"]
    return sum(max(0.0, a - b) for a, b in pairwise(curve))


def epochs_to(curve: list[float], target: float) -> float:
    """The first epoch that reaches a value."""
    return next((n for n, value in enumerate(curve, 1) if value >= target), math.inf)


def _second_table(counted: ByArm) -> list[str]:
    found = _family(
        {
            f"`{arm}` over `{other}`": (counted[arm], counted[other])
            for arm, other in SECOND_FAMILY
            if arm in counted and other in counted
        }
    )
    if not found:
        return []
    lines = [
        "What does it: differences between arms, p adjusted over this table.\n",
        "| | difference | p | verdict |",
        "| --- | --- | --- | --- |",
    ]
    for name, (comparison, p) in found.items():
        lines.append(f"| {name} | {_shown(comparison)} | {p:.4f} | {comparison.verdict(p)} |")
    return lines
