"""Names and notes in a file are shown, and none of them steers the terminal or forges a line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.text import Text
from torch import nn

import we_surgery as ws
from we_surgery._util.text import SafeConsole, printable
from we_surgery.cli import convert_command, inspect_command, strip_command

EVIL = "\x1b]0;evil\x07\x1b[2J\u202e\x9b2J"
SHOWN = "\\x1b]0;evil"


def hostile_module() -> nn.Module:
    model = nn.Module()
    model.add_module(EVIL, nn.Conv2d(3, 4, 3))
    model.add_module("norm\r\n" + EVIL, nn.BatchNorm2d(4))
    return model


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """State dicts, because names like these are refused in a pickled module."""
    converted = ws.convert(hostile_module(), "lwe")
    states = {"vanilla": hostile_module().state_dict(), "converted": converted.state_dict()}
    states["other"] = copy.deepcopy(states["converted"])
    paths = {name: tmp_path / f"{name}.pt" for name in states}
    for name, state in states.items():
        torch.save({"state_dict": state, EVIL: {"x": 1}}, paths[name])
    return paths


def assert_harmless(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text), text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (inspect_command, ["converted"]),
        (inspect_command, ["converted", "other"]),
        (strip_command, ["converted", "-o", "out.pt"]),
        (convert_command, ["vanilla", "--arch", "test_terminal:hostile_module", "--dry-run"]),
        (convert_command, ["vanilla", "--arch", "test_terminal:hostile_module", "-o", "out.pt"]),
    ],
    ids=["inspect", "compare", "strip", "dry run", "convert"],
)
def test_what_commands_print_steers_no_terminal(
    command, words: list[str], files: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [str(files.get(word, word)) for word in words])
    assert result.exit_code == 0, result.output
    assert_harmless(result.output)
    if command is not strip_command:
        assert SHOWN in result.output.replace("\n", "")


def test_a_printed_plan_steers_no_terminal() -> None:
    text = str(ws.plan(hostile_module(), "lwe"))
    assert_harmless(text)
    assert SHOWN in text


def test_styles_reach_the_terminal_and_text_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    SafeConsole(force_terminal=True, color_system="standard").print(Text(EVIL, style="green"))
    printed = capsys.readouterr().out
    assert printed.startswith("\x1b[32m")
    assert_harmless(printed.replace("\x1b[32m", "").replace("\x1b[0m", ""))


def test_what_is_visible_stays_as_it_is() -> None:
    assert printable("layer1.0 │ Größe 宽\nnext") == "layer1.0 │ Größe 宽\nnext"
