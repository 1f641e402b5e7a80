"""Excitations of installed packages, found by their entry points. Nothing is installed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import we_surgery as ws
from we_surgery.excitations import EXCITATIONS
from we_surgery.jobs.methods import family

PACKAGE = """
import we_surgery as ws

class Halved(ws.Excitation):
    name, order, summary, source = "halved", 12, "a part of each weight", "nowhere"

    def __init__(self, part: float = 0.5, *, device, dtype):
        super().__init__()
        self.part = part

    def excite(self, weight):
        return weight * self.part
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """The entry points there are; a test may change them."""
    (tmp_path / "halved_plugin.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    points = [("halved", "halved_plugin:Halved")]

    def entry_points(*, group: str, **_: Any) -> metadata.EntryPoints:
        return metadata.EntryPoints(metadata.EntryPoint(n, v, group) for n, v in points)

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    before = dict(EXCITATIONS)
    yield points
    EXCITATIONS.clear()
    EXCITATIONS.update(before)
    sys.modules.pop("halved_plugin", None)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))


def test_a_plugin_is_imported_only_when_it_is_named() -> None:
    ws.plan(model())
    assert "halved_plugin" not in sys.modules
    plan = ws.plan(model(), rules=[ws.Rule("0", "halved")])
    assert plan.decisions[0].stages == ("halved",)
    assert "halved_plugin" in sys.modules


def test_a_config_and_a_rule_of_it_take_its_options() -> None:
    config = {"conv": "halved", "halved": {"part": 0.25}}
    assert ws.make_policy(config=config).options["halved"] == {"part": 0.25}
    EXCITATIONS.pop("halved")
    rule = {"match": "0", "excite": "halved", "halved": {"part": 0.125}}
    assert ws.make_policy(config={"rules": [rule]}).rules[0].options == {"halved": {"part": 0.125}}


def test_a_checkpoint_that_names_it_is_stripped() -> None:
    converted = ws.convert(model(), rules=[ws.Rule("*", "halved")])
    state = converted.state_dict()
    EXCITATIONS.pop("halved")
    stripped = ws.strip_state_dict(state)
    assert torch.equal(stripped["0.weight"], state["0.raw_weight"] / 2)


def test_it_is_listed() -> None:
    assert "halved" in [method.name for method in family()]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("no_such_plugin:Halved", "cannot be imported: ModuleNotFoundError"),
        ("halved_plugin:Whole", "cannot be imported: AttributeError"),
        ("we_surgery.excitations.mwe:MWE", "its class is not"),
    ],
)
def test_a_broken_plugin_is_an_error_where_it_is_named(
    plugin: list[tuple[str, str]], value: str, cause: str
) -> None:
    plugin[:] = [("halved", value)]
    ws.plan(model())
    with pytest.raises(ws.InputError, match=cause):
        ws.plan(model(), rules=[ws.Rule("0", "halved")])
