"""Every kind of model of torchvision, timm and others: read, converted, proven, stripped.

    python benchmarks/zoo.py                  # the pinned list, about an hour of one core
    python benchmarks/zoo.py --third-party    # other libraries' models, about as long
    python benchmarks/zoo.py --only 'swin'    # the names that a regular expression is found in
    python benchmarks/zoo.py --all            # every timm model that is small enough
    python benchmarks/zoo.py --times          # only read the finished models anew, for the times
    python benchmarks/zoo.py --list           # choose the pinned list anew

What one model has to do to pass is told in ``zoo_check.py``. Each finished model is appended to
a progress file; a run that was stopped goes on where it was, and ``--fresh`` begins again. A
model during which the process died counts as failed. Models that were not run keep the row that
the table had of them, marked as earlier. Times are CPU seconds of one thread.

The third-party models want ``pip install '.[zoo]'``; those of a library that is missing are left
out. Their rows go, as they are finished, to ``results/zoo_third_party.jsonl``.

Writes ``results/zoo.json`` and ``docs/zoo.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from zoo_check import (
    check_model,
    read_shift_network,
    read_without_memory,
    time_reading,
    warm_up,
)
from zoo_list import (
    PINNED,
    SMALL_ENOUGH,
    all_models,
    choose_models,
    parameters_of,
    pinned_models,
    third_party_models,
)
from zoo_report import write_page, write_results
from zoo_row import ZooRow
from zoo_third_party import library_versions

HERE = Path(__file__).parent
PROGRESS = HERE.parent / "build" / "zoo.jsonl"
RESULTS = HERE / "results" / "zoo.json"
THIRD_PARTY = HERE / "results" / "zoo_third_party.jsonl"
SUMMARY = HERE.parent / "docs" / "zoo.md"
LARGE = "timm:vit_giant_patch14_224"
"""A model of a thousand million parameters, read on the meta device."""


class OutOfTime(BaseException):
    """A model took longer than one may; no library's ``except Exception`` catches it."""


def main() -> None:
    """Runs what was asked for and writes the results."""
    options = _options()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}
    if options.list:
        PINNED.write_text("\n".join(choose_models(_note)) + "\n", encoding="utf-8")
        return
    if options.third_party:
        options.progress = options.progress if options.progress != PROGRESS else THIRD_PARTY
    if options.fresh:
        options.progress.unlink(missing_ok=True)
    if options.third_party:
        names = [name for name in third_party_models() if re.search(options.only, name)]
        run(names, options)
        _tidy(options.progress)
        write_page(options.json, options.progress, options.markdown)
        return
    listed = all_models() if options.all else pinned_models()
    names = [name for name in listed if re.search(options.only, name)]
    rows = read_again(names, options) if options.times else run(names, options)
    rows = _with_earlier(rows, listed, options.json)
    apart = {"large": read_without_memory(LARGE), "shift_network": read_shift_network()}
    _note(str(apart))
    write_results(rows, apart, options.mode, len(listed), options.json)
    write_page(options.json, THIRD_PARTY, options.markdown)


def run(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the named models; those in the progress file are not run again."""
    done = _progress(options.progress)
    warm_up()
    fresh = 0
    for index, name in enumerate(names):
        if name in done or fresh == options.limit:
            continue
        if options.all and name.startswith("timm:") and parameters_of(name) > SMALL_ENOUGH:
            continue
        fresh += 1
        _append(options.progress, {"started": name})
        start = time.monotonic()
        row = guarded_check(name, options.mode, options.timeout)
        _append(options.progress, row.to_dict())
        done[name] = row.to_dict()
        verdict = "pass" if row.passed else f"FAIL: {row.cause}"
        _note(f"{index + 1}/{len(names)} {name}: {verdict} ({time.monotonic() - start:.1f} s)")
        gc.collect()
    return [done[name] for name in names if name in done]


def read_again(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished rows of the named models, with what their reading says now."""
    done = _progress(options.progress)
    finished = [name for name in names if name in done]
    warm_up()
    for index, name in enumerate(finished[: options.limit]):
        done[name] |= time_reading(name, options.mode)
        _append(options.progress, done[name])
        _note(f"{index + 1}/{len(finished)} {name}: {done[name]['read_s']} s")
        gc.collect()
    return [done[name] for name in finished]


def _with_earlier(
    rows: list[dict[str, Any]], names: list[str], table: Path
) -> list[dict[str, Any]]:
    """The rows, and for models that have none the one of the table as it is."""
    found = {row["name"]: row for row in rows}
    before = json.loads(table.read_text(encoding="utf-8"))["models"] if table.exists() else []
    earlier = {row["name"]: row | {"earlier": True} for row in before}
    known = earlier | found
    return [known[name] for name in names if name in known]


def guarded_check(name: str, mode: str, seconds: int) -> ZooRow:
    """:func:`check_model`, given up after so many seconds."""
    try:
        with _alarm(seconds):
            return check_model(name, mode)
    except OutOfTime:
        return ZooRow(name, cause=f"took longer than {seconds} s")


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _progress(path: Path) -> dict[str, dict[str, Any]]:
    """The finished models, and the one during which the process died."""
    done: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return done
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "versions" in entry:
            continue
        if "started" in entry:
            dead = ZooRow(entry["started"], cause="the process died")
            done[entry["started"]] = dead.to_dict()
        else:
            done[entry["name"]] = entry
    return done


def _tidy(path: Path) -> None:
    """Leaves the versions and one line for each finished model of the list."""
    done = _progress(path)
    listed = [done[name] for name in third_party_models() if name in done]
    lines = [{"versions": library_versions()}, *listed]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _append(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every timm model of 100M or less")
    parser.add_argument("--third-party", action="store_true", help="other libraries' models")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression")
    parser.add_argument("--limit", type=int, help="run at most so many models, then report")
    parser.add_argument("--mode", default="we", help="the mode of the plans (we)")
    parser.add_argument("--timeout", type=int, default=240, help="seconds a model may take (240)")
    parser.add_argument("--times", action="store_true", help="only read finished models anew")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--list", action="store_true", help="choose the pinned list anew")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="where finished rows go")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--markdown", type=Path, default=SUMMARY, help="where the summary goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
