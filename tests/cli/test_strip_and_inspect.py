"""``we-strip`` and ``we-inspect`` from a user's side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import we_surgery as ws
from we_surgery.cli import inspect_command, strip_command


def strip(*words: str | Path) -> Result:
    return CliRunner().invoke(strip_command, [str(word) for word in words])


def inspect(*words: str | Path) -> Result:
    return CliRunner().invoke(inspect_command, [str(word) for word in words])


@pytest.fixture
def converted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    return ws.convert(model, "lwe")


@pytest.fixture
def module_file(converted: nn.Module, tmp_path: Path) -> Path:
    torch.save(converted, tmp_path / "model.we.pt")
    return tmp_path / "model.we.pt"


def test_a_module_file_gives_a_vanilla_module_file_beside_it(
    module_file: Path, converted: nn.Module
) -> None:
    result = strip(module_file, "--input-shape", "2,4,8,8")
    assert result.exit_code == 0, result.output
    stripped = torch.load(module_file.with_name("model.stripped.pt"), weights_only=False)
    assert [type(layer) for layer in stripped[::3]] == [nn.Conv2d, nn.Conv2d]
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(stripped.eval()(x), converted.eval()(x))
    assert "2 weights folded, each bit-equal" in result.stderr
    assert "largest output difference 0 (0 relative)" in result.stderr


def test_the_stripped_file_needs_nothing_of_ours(module_file: Path) -> None:
    strip(module_file)
    code = (
        "import sys, torch\n"
        "sys.modules['we_surgery'] = None\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(model[0]).__name__)\n"
    )
    target = module_file.with_name("model.stripped.pt")
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "Conv2d"


def test_a_trainers_checkpoint_strips_without_model_code(
    converted: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    state = {f"module._orig_mod.{key}": value for key, value in converted.state_dict().items()}
    torch.save(
        {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 3},
        tmp_path / "last.pth.tar",
    )
    result = strip(tmp_path / "last.pth.tar")
    assert result.exit_code == 0, result.output
    assert "optimizer" in result.stderr
    stripped = torch.load(tmp_path / "last.stripped.pth.tar", weights_only=True)
    expected = ws.strip(converted).state_dict()
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], expected[key]) for key in expected)


def test_a_stripped_state_dict_keeps_its_modules_versions(
    converted: nn.Module, tmp_path: Path
) -> None:
    """Some models, such as torchvision's MNASNet, refuse a state dict without them."""
    torch.save(converted.state_dict(), tmp_path / "weights.pt")
    assert strip(tmp_path / "weights.pt").exit_code == 0
    stripped = torch.load(tmp_path / "weights.stripped.pt", weights_only=True)
    assert stripped._metadata["1"]["version"] == nn.BatchNorm2d(1)._version


def test_the_output_extension_chooses_safetensors(module_file: Path) -> None:
    target = module_file.with_name("deploy.safetensors")
    assert strip(module_file, "-o", target).exit_code == 0
    from safetensors.torch import load_file

    assert set(load_file(target)) == set(ws.strip(ws.load(module_file)).state_dict())


def test_a_vanilla_file_has_nothing_to_strip(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "plain.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    for name in ("plain.pt", "weights.pt"):
        result = strip(tmp_path / name)
        assert (result.exit_code, "nothing to strip" in result.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pt", "weights.pt"]


def test_a_failed_proof_writes_no_file(converted: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        converted.get_submodule("0").raw_weight[0, 0, 0, 0] = float("nan")
    torch.save(converted, tmp_path / "model.pt")
    torch.save(converted.state_dict(), tmp_path / "weights.pt")
    for name in ("model.pt", "weights.pt"):
        result = strip(tmp_path / name)
        assert result.exit_code == 1
        assert "'0'" in result.stderr
        assert "non-finite" in result.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_json_reports_the_proof(module_file: Path) -> None:
    found = json.loads(strip(module_file, "--input-shape", "2,4,8,8", "--json").stdout)
    assert found["report"]["layers"] == 2
    assert found["report"]["output_difference"] == 0


def test_a_terminal_without_the_characters_is_given_others(module_file: Path) -> None:
    runner = CliRunner(charset="ascii")
    result = runner.invoke(inspect_command, [str(module_file)])
    assert result.exit_code == 0, result.output
    assert "@" in result.stdout
    named = module_file.rename(module_file.with_name("größe.pt"))
    result = runner.invoke(inspect_command, [str(named)])
    assert result.exit_code == 0, result.output
    assert "gr\\xf6\\xdfe.pt: module" in result.stdout


def test_inspect_lists_what_was_excited(module_file: Path) -> None:
    result = inspect(module_file)
    assert result.exit_code == 0
    for word in ("0.weight", "8x4x3x3", "standardize+lwe", "mode lwe", "2 excited weights"):
        assert word in result.stdout
    found = json.loads(inspect(module_file, "--json").stdout)
    assert [layer["stages"] for layer in found["layers"]] == [["standardize", "lwe"], ["lwe"]]


def test_inspect_tells_a_vanilla_file_from_a_converted_one(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    result = inspect(tmp_path / "weights.pt")
    assert "vanilla: no excited weights" in result.stdout


def test_a_file_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "canary",)

    torch.save(Payload(), tmp_path / "evil.pt")
    for command in (strip, inspect):
        result = command(tmp_path / "evil.pt")
        assert result.exit_code == 2
        assert "--trust" in result.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("lost", ["0.excitation.", "0.raw_weight", "3.", "excitation."])
def test_a_file_whose_plan_excites_what_it_lacks_is_refused(
    lost: str, converted: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    ws.checkpoint.save(converted, file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state = {key: value for key, value in load_file(file).items() if lost not in key}
    save_file(state, file, metadata=metadata)
    result = strip(file)
    assert result.exit_code == 2, result.output
    layer = "3" if lost == "3." else "0"
    assert f"excites '{layer}'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ("9.raw_weight", "nothing says how '9.raw_weight' were excited"),
        ("9.excitation.lwe.fc1.weight", "whose raw weights are missing"),
        ("9.excitation._extra_state", "whose raw weights are missing"),
    ],
)
def test_half_of_an_excited_weight_is_refused(
    half: str, message: str, converted: nn.Module, tmp_path: Path
) -> None:
    own = {"own.raw_scale": torch.ones(2), "own.excitation.weight": torch.ones(2)}
    torch.save(converted.state_dict() | own, tmp_path / "model.pt")
    assert strip(tmp_path / "model.pt").exit_code == 0
    assert own.keys() <= torch.load(tmp_path / "model.stripped.pt").keys()
    torch.save(converted.state_dict() | {half: torch.ones(2)}, tmp_path / "half.pt")
    result = strip(tmp_path / "half.pt")
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "half.stripped.pt").exists()


def write(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


class Counting(nn.BatchNorm2d):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_a_module_adds_to_its_state_dict_is_no_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), Counting(8))
    torch.save(ws.convert(model, "lwe"), tmp_path / "model.pt")
    result = inspect(tmp_path / "model.pt", "--trust", "--start", tmp_path / "model.pt")
    assert result.exit_code == 0, result.output
    assert "0.weight" in result.stdout
