"""``we-surgery analyse`` from a user's side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import we_surgery as ws
from we_surgery._util.text import SafeConsole
from we_surgery.analysis import Sweep
from we_surgery.cli import we_surgery
from we_surgery.cli.analyse import _table

CODE = """
import torch
from torch import nn

def model():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )

def loader():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4))]

@torch.no_grad()
def metric(model):
    return float(model.eval()(loader()[0][0]).sum())

def train(model, seed):
    with torch.no_grad():
        model[1].bias.add_(seed)

def broken():
    raise ValueError("no data")

def interrupted(model):
    if not hasattr(interrupted, "calls"):
        interrupted.calls = 0
    interrupted.calls += 1
    if interrupted.calls == 4:
        raise KeyboardInterrupt
    return metric(model)

batches = loader()
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    torch.save(ws.convert(layers, "lwe"), tmp_path / "model.we.pt")
    return tmp_path


def analyse(*words: str) -> Result:
    return CliRunner().invoke(we_surgery, ["analyse", *words])


LOADER = ("--loader", "users_code:loader", "-o", "out")


@pytest.mark.parametrize(
    "words",
    [
        ("importance", "model.we.pt", "--steps", "4"),
        ("location", "model.we.pt", "--samples", "2", "2", "--layers", "3"),
        ("multipliers", "model.we.pt", "--granularity", "kernel", "--random-draws", "1"),
        ("prune", "model.we.pt", "--share", "0.5", "--criterion", "magnitude"),
        (
            "sensitivity",
            "users_code:model",
            "--vary",
            "epsilon",
            "--train",
            "users_code:train",
            "--seeds",
            "2",
        ),
    ],
    ids=lambda words: words[0],
)
def test_each_analysis_writes_its_result_and_prints_it(
    words: tuple[str, ...], folder: Path
) -> None:
    result = analyse(*words, *LOADER)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))
    assert names == ["out.csv", "out.json", "out.png", "out.svg"]
    assert "wrote out.json" in result.stderr
    again = analyse(*words, *LOADER)
    assert (again.exit_code, "out.json exists already" in again.stderr) == (2, True)
    forced = analyse(*words, *LOADER, "--force", "--no-picture", "--json")
    assert json.loads(forced.stdout) == json.loads((folder / "out.json").read_text())


def test_a_metric_function_and_a_list_of_batches_serve_as_well(folder: Path) -> None:
    by_list = analyse("importance", "model.we.pt", "--loader", "users_code:batches", "-o", "a")
    assert by_list.exit_code == 0, by_list.output
    assert "100 evaluations, about" in by_list.stderr
    by_function = analyse(
        "importance", "model.we.pt", "--metric", "users_code:metric", "--steps", "3", "-o", "b"
    )
    assert by_function.exit_code == 0, by_function.output
    rows = json.loads((folder / "b.json").read_text())["rows"]
    assert [row["percentile"] for row in rows] == [33, 67, 100]


def test_an_interrupted_run_goes_on(folder: Path) -> None:
    words = ("importance", "model.we.pt", "--steps", "5", "-o", "out")
    stopped = analyse(*words, "--metric", "users_code:interrupted")
    assert stopped.exit_code == 1
    assert (folder / "out.progress.jsonl").exists()
    resumed = analyse(*words, "--metric", "users_code:metric")
    assert resumed.exit_code == 0, resumed.output
    assert "continuing from out.progress.jsonl" in resumed.stderr
    assert "3 evaluations, about" in resumed.stderr
    assert not (folder / "out.progress.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("-o", "out"), "needs exactly one of"),
        ((*LOADER, "--metric", "users_code:metric"), "exactly one of"),
        (("--loader", "users_code.loader", "-o", "out"), "takes package.module:name"),
        (("--loader", "users_code:lodaer", "-o", "out"), "did you mean 'loader'"),
        (("--loader", "no_such_code:loader", "-o", "out"), "'no_such_code' cannot be imported"),
        (("--loader", "users_code:broken", "-o", "out"), "fails: ValueError: no data"),
        (("--metric", "users_code:number", "-o", "out"), "is int, not a function"),
        (("--loader", "users_code:number", "-o", "out"), "--loader users_code:number returned int"),
        (("--loader", "users_code:loader", "-o", "no/out"), "there is no folder no"),
    ],
)
def test_bad_usage_has_a_cause_and_a_cure(words: tuple[str, ...], cause: str, folder: Path) -> None:
    result = analyse("importance", "model.we.pt", *words)
    assert result.exit_code == 2
    assert cause in result.stderr
    assert "fix: " in result.stderr
    assert not list(folder.glob("out*"))


def test_a_sweep_takes_a_vanilla_model(folder: Path) -> None:
    result = analyse(
        "sensitivity", "model.we.pt", "--vary", "epsilon", "--train", "users_code:train", *LOADER
    )
    assert (result.exit_code, "is converted already" in result.stderr) == (2, True)


def test_every_command_helps_with_an_example() -> None:
    for name in ("importance", "location", "multipliers", "prune", "sensitivity"):
        text = analyse(name, "--help").stdout
        assert f"we-surgery analyse {name}" in text
        assert "Exit codes" in text


def test_the_table_of_a_sweep_fits_80_columns() -> None:
    rows = [
        {"variant": name, "seed": seed, "metric": 0.5, "sparsity": 0.0, "difference": 0.01 * seed}
        for seed in range(3)
        for name in ("a" * 30, "b")
    ]
    stdout = SafeConsole(width=200)
    with stdout.capture() as captured:
        stdout.print(_table(Sweep(rows=rows, title="modes", score="accuracy", baseline="b")))
    heading, _, first, second = captured.get().splitlines()
    assert heading.split()[0] == "variant"
    assert {"difference", "low", "high"} <= set(heading.split())
    assert first.split()[0] == "a" * 30
    assert second.split()[0] == "b"
    assert max(len(line.rstrip()) for line in (heading, first, second)) <= 80
