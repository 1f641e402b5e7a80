"""Hostile and broken input through the commands: one message, nothing run, nothing written."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import corpus_pickles
import corpus_usage
import corpus_weights
import pytest
from click.testing import CliRunner
from corpus_pickles import CANARY, Maker

from we_surgery.cli import convert_command, inspect_command, strip_command

FILES: dict[str, Maker] = {**corpus_pickles.cases(), **corpus_weights.cases()}

COMMANDS = {
    "inspect": (inspect_command, []),
    "strip": (strip_command, ["-o", "out.pt"]),
    "convert": (convert_command, ["-o", "out.pt", "--arch", "toys:ConvNet"]),
}


def snapshot(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
        for path in folder.iterdir()
    }


def refused(command: object, arguments: list[str], folder: Path) -> str:
    """Runs a command that must fail as it should; returns what it says."""
    before = snapshot(folder)
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 2, result.stderr
    assert errors[0].startswith("error: ")
    assert errors[1].startswith("  fix: ")
    assert len(errors[0]) > len("error: ")
    assert len(errors[1]) > len("  fix: ")
    assert all(len(line) < 2000 for line in errors)
    assert not (folder / CANARY).exists()
    assert snapshot(folder) == before
    return result.stderr


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_refused_by_every_command(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = FILES[case](tmp_path)
    for command, options in COMMANDS.values():
        refused(command, [path.name, *options], tmp_path)


@pytest.mark.parametrize("case", corpus_weights.EXCITED)
@pytest.mark.parametrize("to", ["state_dict", "safetensors"])
def test_an_excitation_that_does_not_fit_is_not_stripped(
    case: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = corpus_weights.EXCITED[case](tmp_path)
    arguments = [
        path.name,
        "--to",
        to,
        "-o",
        "out" + (".safetensors" if to == "safetensors" else ".pt"),
    ]
    refused(strip_command, [*arguments, "--arch", "toys:ConvNet"], tmp_path)


@pytest.mark.parametrize("case", corpus_weights.ARCHITECTURES)
def test_an_architecture_in_a_file_builds_a_known_model_or_none(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = corpus_weights.described(corpus_weights.ARCHITECTURES[case])(tmp_path)
    refused(convert_command, [path.name, "-o", "out.pt"], tmp_path)


def test_an_architecture_in_a_header_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = {"name": "os:system", "arguments": {"command": f"touch {CANARY}"}}
    path = corpus_weights.in_header({"schema": 1, "architecture": code})(tmp_path)
    said = refused(convert_command, [path.name, "-o", "out.pt"], tmp_path)
    assert "code to import" in said
    refused(strip_command, [path.name, "-o", "out.pt", "--to", "module"], tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    corpus_usage.prepare(folder)
    return folder


USAGES = corpus_usage.cases()


@pytest.mark.parametrize("case", USAGES)
def test_what_does_not_fit_is_refused(
    case: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    command, *arguments = USAGES[case](tmp_path)
    refused(COMMANDS[command][0], arguments, tmp_path)


def test_the_corpus_is_large() -> None:
    assert len(FILES) + len(USAGES) + len(corpus_weights.EXCITED) >= 400
