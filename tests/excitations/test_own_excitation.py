"""A method of the user's own: docs/writing_an_excitation.md, and its way through all interfaces."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import we_surgery as ws
from we_surgery.cli import convert_command, strip_command
from we_surgery.excitations import EXCITATIONS

PAGE = Path(__file__).parents[2] / "docs" / "writing_an_excitation.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(EXCITATIONS)
    yield
    EXCITATIONS.clear()
    EXCITATIONS.update(before)


def test_the_page_runs_from_top_to_bottom_and_prints_what_it_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out.rstrip()
    assert printed
    assert f"```\n{printed}\n```" in PAGE.read_text(encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The class and the line of the page as a package that nobody has imported."""
    (tmp_path / "peak_gains.py").write_text("\n".join(BLOCKS[:2]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "peak_gains"
    sys.modules.pop("peak_gains", None)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def run(command: Any, *words: object) -> None:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["module", "state_dict"])
def test_the_command_line_converts_and_strips_with_it(
    kind: str, package: str, tmp_path: Path
) -> None:
    model, source = make_model(), tmp_path / "model.pt"
    torch.save(model, source)
    config = tmp_path / "config.yaml"
    config.write_text("conv: peak_gain\npeak_gain: {peaks: 3}\n", encoding="utf-8")
    converted, stripped = tmp_path / "model.we.pt", tmp_path / "stripped.pt"
    run(convert_command, source, "--config", config, "--allow", package)
    if kind == "state_dict":
        whole = torch.load(converted, weights_only=False)
        converted = tmp_path / "checkpoint.pt"
        torch.save({"state_dict": whole.state_dict()}, converted)
    run(strip_command, converted, "-o", stripped, "--allow", package, "--to", kind)
    found = torch.load(stripped, weights_only=kind == "state_dict")
    weight = (found if kind == "state_dict" else found.state_dict())["0.weight"]
    assert weight.shape == model[0].weight.shape
    assert not torch.equal(weight, model[0].weight)


def test_a_file_with_a_method_that_is_not_registered_names_it(package: str) -> None:
    __import__(package)
    state = ws.convert(make_model(), config={"conv": "peak_gain"}).state_dict()
    del EXCITATIONS["peak_gain"]
    with pytest.raises(ws.InputError, match="no excitation called 'peak_gain'"):
        ws.strip_state_dict(state)


def test_saving_and_loading_keep_it(package: str, tmp_path: Path) -> None:
    __import__(package)
    model = ws.convert(make_model(), config={"conv": "peak_gain"}).eval()
    ws.save(model, tmp_path / "model.pt")
    loaded = ws.load(tmp_path / "model.pt", allow=[package]).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded(x), model(x))
