"""The zoo's table as JSON, and its summary as Markdown."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from zoo_third_party import read_rows, third_party_part

COMMAND = "python benchmarks/zoo.py"
_SLOW = 0.95
_PRESERVED = 1e-5

# Reasons that only parameters without a conv, linear or attention layer of their own can have.
_BARE = (
    "is multiplied as x @ W",
    "is one part of a weight",
    "is a stack of matrices",
    "is shared with",
)

Row = Mapping[str, Any]


def write_results(
    rows: Sequence[Row],
    apart: Mapping[str, Row],
    mode: str,
    asked: int,
    json_file: Path,
) -> None:
    """Writes the table.

    Args:
        rows: one a finished model.
        apart: what reading two models that are in no row cost: ``large``, on the meta device,
            and ``shift_network``.
        mode: the mode of the plans.
        asked: how many models were to be run.
        json_file: where the table goes, a row a line.
    """
    head = {
        "command": COMMAND,
        "mode": mode,
        "asked": asked,
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, one thread",
        **apart,
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    opening = json.dumps(head, indent=1).removesuffix("\n}")
    json_file.write_text(f'{opening},\n "models": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def write_page(json_file: Path, third_party: Path, markdown_file: Path) -> None:
    """Writes the summary of both tables; the second may not be there yet."""
    table = json.loads(json_file.read_text(encoding="utf-8"))
    parts = [as_markdown(table.pop("models"), table)]
    if third_party.exists():
        parts.append(third_party_part(*read_rows(third_party)))
    markdown_file.parent.mkdir(parents=True, exist_ok=True)
    markdown_file.write_text("\n".join(parts), encoding="utf-8")


def as_markdown(rows: Sequence[Row], head: Row) -> str:
    """The summary: totals, readings, reasons, exceptions with their cause, speed."""
    passed = [row for row in rows if row["passed"]]
    weights = sum(row["weights"] for row in rows)
    converted = sum(row["converted"] for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    parts = [
        "# The zoo\n",
        "Models of torchvision and timm first; those of twelve other libraries are "
        "[below](#other-libraries).\n",
        f"Written by `{head['command']}`; do not edit. Mode `{head['mode']}`, random weights, the "
        f"smallest inputs each model takes; {versions}; {head['machine']}. Every model's row is "
        "in [zoo.json](../benchmarks/results/zoo.json); what a model has to do to pass is told "
        "at the top of [zoo_check.py](../benchmarks/zoo_check.py).\n",
        _unfinished(rows, head["asked"]),
        _table(
            ("", "models", "share"),
            [
                ("run", len(rows), ""),
                ("pass", len(passed), _share(len(passed), len(rows))),
                ("fail", len(rows) - len(passed), _share(len(rows) - len(passed), len(rows))),
                _whole(rows),
            ],
        ),
        f"{converted:,} of {weights:,} weights were converted. Largest difference of the excited "
        f"and the stripped outputs, over the larger of 1 and the largest output: "
        f"{max((row['difference'] or 0.0 for row in rows), default=0.0):.2g}.\n",
        "## How they were read\n",
        _table(
            ("reading", "models"), Counter(row["read_by"] or "not read" for row in rows).items()
        ),
        "## Weights left alone\n",
        _table(("reason", "weights", "models"), _reasons(rows)),
        "## Exceptions\n",
        "Weights that neither the mode nor the model asks to leave alone, and models that do not "
        "pass. Weights multiplied as x @ W, computed from several parts, or stacked belong to "
        "modules that are no conv, linear or attention layer, such as mixtures of kernels.\n",
        _table(("model", "weights", "cause"), _exceptions(rows)),
        "## Pretrained starts\n",
        'Converted with `init="preserve"`, in eval mode: the largest output difference from the '
        "vanilla model, over the larger of 1 and the largest output. Detectors return what they "
        "chose by scores that with random weights are all but equal; there each converted layer "
        "is compared, given what the vanilla layer is given.\n",
        _table(("mode", "models", "within 1e-5", "median", "largest"), _preserved(rows)),
        _amplifiers(rows),
        "## Speed\n",
        "CPU seconds of one thread, median and 95th percentile over the models of this run. "
        "Reading records a forward in eval and one in train mode, without weights; the proof "
        "records both again.\n",
        _table(("step", "median", "95th percentile", "largest"), _speed(rows)),
        _large(head["large"]),
        _shift_network(head["shift_network"]),
    ]
    return "\n".join(part for part in parts if part)


def _unfinished(rows: Sequence[Row], asked: int) -> str:
    earlier = sum(row.get("earlier", False) for row in rows)
    lines = []
    if len(rows) < asked:
        lines.append(f"Run were {len(rows) - earlier} of {asked} models, the smallest first.")
    if earlier:
        lines.append(
            f"{len(rows) - earlier} rows are of this run, the smallest models first. The other "
            f"{earlier}, marked as earlier in zoo.json, are of a run before it, with the versions "
            "of that day."
        )
    return " ".join(lines) + "\n" if lines else ""


def _whole(rows: Sequence[Row]) -> tuple[str, int, str]:
    whole = sum(
        row["passed"] and all(reason.startswith(_BARE) for reason in row["exceptions"].values())
        for row in rows
    )
    return "every conv, linear and attention layer converted", whole, _share(whole, len(rows))


def _reasons(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    weights: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        weights.update(row["alone"])
        models.update(row["alone"].keys())
    return [(reason, count, models[reason]) for reason, count in weights.most_common()]


def _exceptions(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for layer, reason in row["exceptions"].items():
            reasons.setdefault(reason, []).append(layer)
        for reason, layers in reasons.items():
            found.append((row["name"], len(layers), f"`{layers[0]}` {_cell(reason)}"))
        if not row["passed"]:
            found.append((row["name"], "", f"fails: {_cell(row['cause'])}"))
    return found or [("none", "", "")]


def _preserved(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    by_mode: dict[str, list[float]] = {}
    for row in rows:
        for mode, difference in row.get("preserved", {}).items():
            by_mode.setdefault(mode, []).append(difference)
    return [
        (
            f"`{mode}`",
            len(found),
            sum(difference <= _PRESERVED for difference in found),
            f"{statistics.median(found):.1e}",
            f"{max(found):.1e}",
        )
        for mode, found in by_mode.items()
    ]


def _amplifiers(rows: Sequence[Row]) -> str:
    found = [
        f"`{row['name']}` amplifies rounding: its outputs differ by "
        f"{max(row['preserved'].values()):.1e}, and the vanilla model's own in float32 differ from "
        f"those in float64 by {row['rounding']:.1e}."
        for row in rows
        if row.get("rounding") is not None
    ]
    return " ".join(found) + "\n" if found else ""


def _speed(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    steps = {
        "vanilla forward": "forward_s",
        "read": "read_s",
        "convert": "convert_s",
        "proof": "prove_s",
        "strip": "strip_s",
    }
    read = [row for row in rows if row["read_by"] and not row.get("earlier", False)]
    found: list[tuple[object, ...]] = []
    for step, key in steps.items():
        times = sorted(row[key] for row in read) or [0.0]
        found.append((step, *(f"{_at(times, part):.2f}" for part in (0.5, _SLOW, 1.0))))
    ratios = sorted(row["read_s"] / row["forward_s"] for row in read if row["forward_s"]) or [0.0]
    found.append(("read / forward", *(f"{_at(ratios, part):.1f}" for part in (0.5, _SLOW, 1.0))))
    return found


def _at(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def _large(large: Row) -> str:
    return (
        f"On the meta device, {large['name']} with {large['parameters']:,} parameters is read in "
        f"{large['read_s']:.2f} s ({large['read_by']}; {large['converted']} of {large['weights']} "
        f"weights to convert); the process's peak memory grew by "
        f"{large['peak_memory_grew_by_mib']:.0f} MiB.\n"
    )


def _shift_network(shifts: Row) -> str:
    return (
        f"{shifts['name']}, 8 frames of 224 px, is read in {shifts['read_s']:.2f} s, "
        f"{shifts['read_s'] / shifts['forward_s']:.1f} times a forward "
        f"({shifts['shift_fed']} shift-fed convs found).\n"
    )


def _share(count: int, whole: int) -> str:
    return f"{count / max(1, whole):.1%}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: object) -> str:
    lines = [header, ["---"] * len(header), *rows]  # type: ignore[misc]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
