"""docs/architecture.md: its drawing, its arrows and its file names are those of the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_each_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`([\w/]+\.(?:py|yaml|md))`", PAGE))
    assert len(named) > 50
    folders = (ROOT, ROOT / "we_surgery")
    assert not {name for name in named if not any((at / name).is_file() for at in folders)}
    rooms = set(re.findall(r"`([\w/]+/)`", PAGE))
    assert not {name for name in rooms if not any((at / name).is_dir() for at in folders)}


def drawn_floors() -> list[list[str]]:
    """The rooms of the drawing, from the roof down; several on a floor do not import each other."""
    drawing = re.search(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    assert drawing is not None
    lines = [line for line in drawing[1].splitlines() if line[0] != " "]
    return [re.split(r" {2,}", line)[0].split(" | ") for line in lines]


def test_the_drawing_has_the_order_that_lint_checks() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = config["tool"]["importlinter"]["contracts"]
    # What stands above all others is not drawn.
    assert [["__main__"], *drawn_floors()] == [names.split(" | ") for names in contract["layers"]]


def test_every_import_of_the_code_goes_down_in_the_drawing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "house.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    arrows = json.loads(done.stdout)["arrows"]
    # Of the files in the root, rooms import the errors alone.
    del arrows["(root)"]
    floor = {name: number for number, names in enumerate(drawn_floors()) for name in names}
    assert floor.keys() == {*arrows, "api", "fx", "errors"}
    for room, others in arrows.items():
        assert all(floor[room] < floor.get(name, floor["errors"]) for name in others), room
