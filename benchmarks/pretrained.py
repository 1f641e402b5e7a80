"""Does ``init="preserve"`` keep what a model computes? Every kind of model, every mode.

    python benchmarks/pretrained.py                 # the pinned zoo, about an hour of one core
    python benchmarks/pretrained.py --only 'swin'   # the names a regular expression is found in

Each model is converted in each mode with ``init="preserve"``, and its outputs in eval mode are
compared with those of the model itself, over the larger of 1 and the largest output; for scale,
also with those of ``init="paper"``. Weights are random, the norms' statistics fitted to the
input where outputs would overflow. With ``--limit N`` the N smallest are taken; stopped by
Ctrl-C, it writes what is done.

Writes ``pretrained.json`` and ``pretrained.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from zoo_check import calibrate
from zoo_list import pinned_models
from zoo_models import build, candidates

import we_surgery as ws
from we_surgery.proof import largest_differences, run_in_eval

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-5


@dataclass
class Row:
    """One model: its largest relative output difference by mode, or why there is none."""

    name: str
    preserved: dict[str, float] = field(default_factory=dict)
    redrawn: float | None = None
    """The same with ``init="paper"``, in the last mode."""
    cause: str = ""

    @property
    def passed(self) -> bool:
        """Whether all modes keep the outputs."""
        return not self.cause and max(self.preserved.values()) <= TOLERANCE


def check(name: str, modes: Sequence[str] = tuple(ws.MODES)) -> Row:
    """Converts one model in each mode; what goes wrong is in the row."""
    row = Row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(row, modes)
        except Exception as error:
            row.cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def _check(row: Row, modes: Sequence[str]) -> None:
    model = build(row.name)
    for candidate in candidates(row.name, model):
        inputs = candidate.inputs
        try:
            outputs = run_in_eval(model, inputs)
            if not all(bool(output.isfinite().all()) for output in outputs):
                calibrate(model, inputs)
                outputs = run_in_eval(model, inputs)
            break
        except ws.InputError:
            continue
    else:
        row.cause = "the model takes none of the inputs"
        return
    if not all(bool(output.isfinite().all()) for output in outputs):
        row.cause = "its outputs are not finite"
        return
    for mode in modes:
        converted = ws.convert(model, mode, init="preserve")
        found = run_in_eval(converted, inputs)
        if [output.shape for output in found] != [output.shape for output in outputs]:
            row.cause = f"{mode}: a threshold inside the model gives outputs of another shape"
            return
        row.preserved[mode] = largest_differences(outputs, found)[1]
    found = run_in_eval(ws.convert(model, modes[-1], inplace=True), inputs)
    if [output.shape for output in found] == [output.shape for output in outputs]:
        difference = largest_differences(outputs, found)[1]
        row.redrawn = difference if difference < float("inf") else None


def as_markdown(rows: Sequence[Row], listed: int) -> str:
    """Totals, the spread of the differences by mode, and what did not pass."""
    passed = [row for row in rows if row.passed]
    redrawn = [row.redrawn for row in rows if row.redrawn is not None]
    lines = [
        '# Outputs after `init="preserve"`\n',
        "Written by `benchmarks/pretrained.py`. Largest output difference in eval mode, fp32, "
        "over the larger of 1 and the largest output.\n",
        f"{len(passed)} of {len(rows)} models within {TOLERANCE:g} in all modes "
        f'({listed} are listed). With `init="paper"` the median difference is '
        f"{statistics.median(redrawn):.2g}.\n",
        "| mode | models | median | largest |",
        "| --- | --- | --- | --- |",
    ]
    for mode in ws.MODES:
        values = [row.preserved[mode] for row in rows if mode in row.preserved]
        if not values:
            continue
        middle = statistics.median(values)
        lines.append(f"| `{mode}` | {len(values)} | {middle:.1e} | {max(values):.1e} |")
    left = [row for row in rows if not row.passed]
    if left:
        lines += [
            "",
            "Not within the bound. A detector with random weights chooses among boxes of nearly "
            "equal scores, and a difference in the last digit of a score chooses others.\n",
        ]
        lines += ["| model | difference by mode, or cause |"]
        lines.append("| --- | --- |")
        for row in left:
            modes = ", ".join(f"{mode} {value:.1e}" for mode, value in row.preserved.items())
            lines.append(f"| `{row.name}` | {row.cause or modes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression")
    parser.add_argument("--limit", type=int, help="at most so many models, the smallest first")
    parser.add_argument("--mode", action="append", help="one mode, repeatable; by default all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pinned = pinned_models()
    names = [name for name in pinned if re.search(options.only, name)][: options.limit]
    rows: list[Row] = []
    with contextlib.suppress(KeyboardInterrupt):
        for index, name in enumerate(names):
            rows.append(check(name, options.mode or tuple(ws.MODES)))
            largest = max(rows[-1].preserved.values(), default=float("nan"))
            sys.stderr.write(f"{index + 1}/{len(names)} {name}: {rows[-1].cause or largest}\n")
            sys.stderr.flush()
    options.output.mkdir(parents=True, exist_ok=True)
    found = [asdict(row) for row in rows]
    (options.output / "pretrained.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(rows, len(pinned))
    (options.output / "pretrained.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
