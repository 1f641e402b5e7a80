"""Checkpoints of attached runs: what commands tell of the excitation in the optimizer's state."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from equal_forms import Net, batches, plain_step
from sharded_files import write_dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import we_surgery as ws
from we_surgery.attached.registry import STATE_KEY
from we_surgery.attached.state import parts_of
from we_surgery.cli import analyse_group, inspect_command

Trained = tuple[nn.Module, torch.optim.Optimizer, ws.AttachedExcitation]


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    for t, batch in enumerate(batches(3)):
        plain_step(optimizer, model, batch, t)
    return model, optimizer, excitation


def beside(optimizer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with ``state="parameter"``."""
    states = {key: dict(kept) for key, kept in optimizer["state"].items() if key != STATE_KEY}
    for number, part in enumerate(parts_of(own).values()):
        states[number][STATE_KEY] = part
    return {**optimizer, "state": states}


def run(*words: str | Path) -> Result:
    command = ["--allow", "equal_forms", *(str(word) for word in words)]
    result = CliRunner().invoke(inspect_command, command)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    "checkpoint",
    [
        lambda model, optimizer, _: {"model": model, "optimizer": optimizer},
        lambda model, optimizer, _: {"state_dict": model, "optimizer_states": [optimizer]},
        lambda model, _, own: {"model": model, "excitation": own, "epoch": 3},
        lambda model, optimizer, own: {"model": model, "optimizer": beside(optimizer, own)},
    ],
)
def test_inspect_tells_of_an_attached_run_what_it_tells_of_the_converted_one(
    trained: Trained, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    model, optimizer, excitation = trained
    states = (model.state_dict(), optimizer.state_dict(), excitation.state_dict())
    torch.save(checkpoint(*states), tmp_path / "run.pt")
    torch.save(excitation.converted(), tmp_path / "twin.pt")
    attached = json.loads(run(tmp_path / "run.pt", "--json").stdout)
    converted = json.loads(run(tmp_path / "twin.pt", "--json").stdout)
    assert len(attached["layers"]) == len(excitation.plan.excited)
    assert attached["is_attached"]
    for key in ("layers", "plan", "mode", "learned", "tensors", "values", "stripped_values"):
        assert attached[key] == converted[key], key
    shown = run(tmp_path / "run.pt")
    assert "attached: 6 excited weights, mode lwe+mwe; the model is vanilla" in shown.output
    assert "after 3 steps" in shown.output
    page = tmp_path / "page.html"
    run(tmp_path / "run.pt", "--html", page, "--start", tmp_path / "twin.pt")
    assert "tied_too" in page.read_text()
    assert "attached in mode lwe+mwe" in page.read_text()


@pytest.mark.parametrize("form", ["optimizer", "parameter", "separate"])
def test_inspect_tells_the_same_of_a_distributed_checkpoint(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    excitation = ws.attach(model, optimizer, "lwe+mwe", state=form)
    for t, batch in enumerate(batches(3)):
        plain_step(optimizer, model, batch, t)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    if form == "separate":
        saved["excitation"] = excitation.state_dict()
    if form == "parameter":
        saved["optimizer"] = get_optimizer_state_dict(model, optimizer)
    write_dcp(saved, tmp_path / "folder")
    torch.save(excitation.converted(), tmp_path / "twin.pt")
    folder = json.loads(run(tmp_path / "folder", "--json").stdout)
    twin = json.loads(run(tmp_path / "twin.pt", "--json").stdout)
    assert (folder["kind"], folder["is_attached"]) == ("dcp", True)
    for key in ("layers", "plan", "learned", "tensors"):
        assert folder[key] == twin[key], key


def test_an_average_beside_an_attached_run_is_vanilla(trained: Trained, tmp_path: Path) -> None:
    model, optimizer, _ = trained
    state = model.state_dict()
    both = {"model": state, "model_ema": state, "optimizer": optimizer.state_dict()}
    torch.save(both, tmp_path / "run.pt")
    assert "attached: 6 excited weights" in run(tmp_path / "run.pt").output
    assert "vanilla: no excited" in run(tmp_path / "run.pt", "--key", "model_ema").output


def test_each_of_several_optimizers_has_its_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    heads = [model.head.weight]
    rest = [p for p in model.parameters() if p is not heads[0]]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (heads, rest)]
    excitation = ws.attach(model, optimizers, "mwe")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"state_dict": model.state_dict(), "optimizers": states}, tmp_path / "run.pt")
    found = json.loads(run(tmp_path / "run.pt", "--json").stdout)
    # The plan has a row for each of two tied layers, and the file an entry.
    assert len(found["layers"]) == len(excitation.plan.excited)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda own: own["weights"]["mix.weight"].pop("raw"), "'mix.weight'.*cannot be read"),
        (
            lambda own: own["weights"].update({"a.weight": own["weights"]["mix.weight"]}),
            "no weight of this name",
        ),
        (lambda own: own.update(plan="[1"), "cannot be read"),
        (lambda own: own.update(plan=3), "cannot be read"),
        (lambda own: own.update(steps="many"), "cannot be read"),
    ],
)
def test_a_damaged_excitation_is_an_error(
    trained: Trained, damage: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    model, _, excitation = trained
    own = excitation.state_dict()
    damage(own)
    saved = {"model": model.state_dict(), "excitation": own}
    torch.save(saved, tmp_path / "run.pt")
    write_dcp(saved, tmp_path / "folder")
    for place in ("run.pt", "folder"):
        result = CliRunner().invoke(inspect_command, [str(tmp_path / place)])
        assert result.exit_code == 2
        assert re.search(message, " ".join(result.output.split())), result.output


def test_analyses_of_multipliers_take_an_attached_run(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, excitation = trained
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "run.pt")
    torch.save(excitation.converted(), tmp_path / "twin.pt")
    (tmp_path / "data_of_this_test.py").write_text(
        "import torch\n"
        "def loader():\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for source, how in (("run.pt", ["--arch", "equal_forms:Net"]), ("twin.pt", [])):
        words = ["multipliers", str(tmp_path / source), "--allow", "equal_forms", *how]
        words += ["--loader", "data_of_this_test:loader", "-o", str(tmp_path / source[:-3])]
        result = CliRunner().invoke(analyse_group, [*words, "--no-picture"])
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / source).with_suffix(".json").read_text()))
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["rows"]
