"""Results on disk, pictures, and what happens without matplotlib."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from analysis_data import Residual, batches, converted, sweep_of

import we_surgery as ws
from we_surgery.analysis import (
    Ablation,
    draw,
    location_maps,
    magnitude_curve,
    multiplier_validity,
    progress_bar,
    pruning_curve,
    save_result,
)
from we_surgery.analysis.pictures import render

SWEEP = sweep_of(
    ("vanilla", 0, 0.9, 0.0),
    ("vanilla", 1, 0.8, 0.0),
    ("mwe", 0, 0.95, 0.05),
    ("mwe", 1, None, None),
)
SPARSE = replace(
    SWEEP,
    rows=[
        {**SWEEP.rows[0], "strength": 0.0, "sparsity": 0.1},
        {**SWEEP.rows[0], "strength": 0.1, "sparsity": 0.5},
    ],
)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return {
        "magnitude": magnitude_curve(Residual(), batches(1), positions=[1, 50, 100]),
        "location": location_maps(Residual(), batches(1), samples=(2, 2)),
        "multipliers": multiplier_validity(converted(), batches(1)),
        "prune": pruning_curve(converted(), batches(1), shares=[0.1, 0.5]),
        "sensitivity": SWEEP,
        "several strengths": SPARSE,
    }


NAMES = ("magnitude", "location", "multipliers", "prune", "sensitivity", "several strengths")


@pytest.mark.parametrize("name", NAMES)
def test_json_csv_and_pictures_are_written(
    name: str, results: dict[str, Any], tmp_path: Path
) -> None:
    result = results[name]
    paths = save_result(result, tmp_path / "out.v1")
    assert [path.name for path in paths] == [f"out.v1.{k}" for k in ("json", "csv", "png", "svg")]
    found = json.loads(paths[0].read_text())
    assert found["analysis"] == result.analysis
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == len(result.rows)
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[3].read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_result_gives_the_same_picture(name: str, results: dict[str, Any]) -> None:
    assert render(results[name], "svg") == render(results[name], "svg")


def test_maps_diverge_from_zero_and_mark_what_is_below() -> None:
    rows = [
        {"layer": "conv", "out_channel": output, "in_channel": channel, "drop": drop}
        for (output, channel), drop in {(0, 0): 0, (0, 1): 0.3, (1, 0): -0.1, (1, 1): 0}.items()
    ]
    maps = Ablation(analysis="location", rows=rows, score="accuracy", baseline=0.9, layers=["conv"])
    axes, _ = draw(maps).axes
    (image,) = axes.get_images()
    assert image.get_clim() == (-0.3, 0.3)
    dashes = [(x, y) for line in axes.get_lines() for x, y in line.get_xydata()]
    assert dashes == [(0, 1)]


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    (tmp_path / "out.svg").write_text("mine")
    with pytest.raises(ws.InputError, match=r"out.svg exists already"):
        save_result(SWEEP, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.svg"]
    save_result(SWEEP, tmp_path / "out", force=True)
    assert len(list(tmp_path.iterdir())) == 4


def test_numbers_json_does_not_have_are_null(tmp_path: Path) -> None:
    failed = sweep_of(("a", 0, float("inf"), 0.0))
    save_result(failed, tmp_path / "out", picture=False)
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["metric"] is None


def test_without_matplotlib_the_cure_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ws.InputError, match=r"pip install matplotlib"):
        save_result(SWEEP, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert len(save_result(SWEEP, tmp_path / "out", picture=False)) == 2


def test_the_analyses_import_no_matplotlib() -> None:
    code = "import sys, we_surgery.analysis; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_progress_bar_says_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress(0, 400)
        progress(1, 400)
        progress(2, 400)
    assert capsys.readouterr().err == "400 evaluations, about 0:00:00 (h:mm:ss)\n"
