"""``we-strip``: which weights, which dtype, what is compared, and what it says of the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from sharded_files import write_dcp, write_shards
from torch import nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter
from we_surgery.cli import convert_command, inspect_command, strip_command
from we_surgery.errors import SurgeryError
from we_surgery.jobs import strip as stripping
from we_surgery.jobs import verify as verification

ARCH = ("--arch", "toys:ConvNet")
SHAPE = ("--input-shape", "2,3,8,8")


def strip(*words: str | Path) -> Result:
    return CliRunner().invoke(strip_command, [str(word) for word in words])


@pytest.fixture
def converted() -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(ConvNet(), config=EVERYTHING)


@pytest.fixture
def averaged(converted: nn.Module) -> dict[str, torch.Tensor]:
    state = converted.state_dict()
    return {k: v * 0.5 if k.endswith("raw_weight") else v for k, v in state.items()}


@pytest.fixture
def trainers_file(converted: nn.Module, averaged: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    content = {"state_dict": converted.state_dict(), "state_dict_ema": averaged, "epoch": 1}
    torch.save(content, tmp_path / "last.pth.tar")
    return tmp_path / "last.pth.tar"


def assert_vanilla(path: Path, state: dict[str, torch.Tensor]) -> None:
    expected = ws.strip_state_dict(state)
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Which weights.


def test_raw_and_ema_choose_wherever_the_trainer_put_them(
    trainers_file: Path, converted: nn.Module, averaged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    lightning = {"current_model_state": converted.state_dict(), "state_dict": averaged}
    torch.save(lightning, tmp_path / "lightning.ckpt")
    torch.save({"model": converted.state_dict(), "ema": averaged}, tmp_path / "other.pt")
    for file in (trainers_file, tmp_path / "lightning.ckpt", tmp_path / "other.pt"):
        for option, expected in (("--raw", converted.state_dict()), ("--ema", averaged)):
            target = tmp_path / "out.safetensors"
            done = strip(file, option, "-o", target, "--force")
            assert done.exit_code == 0, done.output
            assert_vanilla(target, expected)


def test_both_write_two_files(
    trainers_file: Path, converted: nn.Module, averaged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    done = strip(trainers_file, "--both", "--json")
    assert done.exit_code == 0, done.output
    assert_vanilla(tmp_path / "last.stripped.pth.tar", converted.state_dict())
    assert_vanilla(tmp_path / "last.stripped.ema.pth.tar", averaged)
    targets = [Path(row["target"]).name for row in json.loads(done.stdout)]
    assert targets == ["last.stripped.pth.tar", "last.stripped.ema.pth.tar"]


@pytest.mark.parametrize("name", ["run.stripped", "deploy.v2"])
def test_the_second_folder_has_one_name_whatever_is_there(
    name: str, converted: nn.Module, averaged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = write_dcp({"model": converted.state_dict(), "ema": averaged}, tmp_path / "run")
    words = () if name == "run.stripped" else ("-o", tmp_path / name)
    for force in ((), ("--force",)):
        done = strip(source, "--both", *words, *force)
        assert done.exit_code == 0, done.output
        assert names(tmp_path) == sorted(["run", name, f"{name}.ema"])


def test_the_average_alone_has_a_name_of_its_own(
    trainers_file: Path, averaged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for option in ("--raw", "--ema"):
        done = strip(trainers_file, option)
        assert done.exit_code == 0, done.output
    files = ["last.pth.tar", "last.stripped.ema.pth.tar", "last.stripped.pth.tar"]
    assert names(tmp_path) == files
    assert_vanilla(tmp_path / files[1], averaged)
    assert strip(trainers_file, "--ema", "-o", tmp_path / "out.pt").exit_code == 0
    assert_vanilla(tmp_path / "out.pt", averaged)


def test_a_private_checkpoint_gives_private_files(trainers_file: Path, tmp_path: Path) -> None:
    trainers_file.chmod(0o600)
    assert strip(trainers_file, "--both").exit_code == 0
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("command", [strip_command, convert_command, inspect_command])
def test_each_command_tells_its_version(command: Any) -> None:
    done = CliRunner().invoke(command, ["--version"])
    assert (done.exit_code, ws.__version__ in done.stdout) == (0, True)


def test_two_choices_of_weights_are_refused(trainers_file: Path) -> None:
    for second in ("--ema", "--both"):
        done = strip(trainers_file, "--raw", second)
        assert (done.exit_code, "more than one of" in done.stderr) == (2, True)


@pytest.mark.parametrize("where", [".", ".."])
def test_a_folder_of_one_file_lends_its_own_name(
    where: str, converted: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "inner").mkdir(parents=True)
    ws.save(converted, tmp_path / "run" / "model.safetensors")
    monkeypatch.chdir(tmp_path / "run" / ("inner" if where == ".." else ""))
    done = strip(where)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["run", "run.stripped"]


def test_both_write_no_file_where_one_fails(
    converted: nn.Module, averaged: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    averaged["head.raw_weight"][0, 0] = float("nan")
    torch.save({"model": converted.state_dict(), "ema": averaged}, tmp_path / "last.pt")
    done = strip(tmp_path / "last.pt", "--both")
    assert done.exit_code == 1
    assert "non-finite" in done.stderr
    assert names(tmp_path) == ["last.pt"]


def test_an_average_that_is_not_there_is_named(converted: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": converted.state_dict(), "epoch": 1}, tmp_path / "last.pt")
    for option in ("--ema", "--both"):
        done = strip(tmp_path / "last.pt", option)
        assert done.exit_code == 2
        assert "no EMA weights" in done.stderr
    done = strip(tmp_path / "last.pt", "--raw", "--key", "state_dict")
    assert (done.exit_code, "--raw" in done.stderr) == (2, True)
    assert names(tmp_path) == ["last.pt"]


# Which dtype.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("form", ["state_dict", "module", "shards"])
def test_a_cast_rounds_the_float32_fold_once(
    form: str, dtype: str, converted: nn.Module, tmp_path: Path
) -> None:
    source = tmp_path / "model.pt"
    if form == "shards":
        source = write_shards(converted.state_dict(), tmp_path / "in", 2)
    else:
        torch.save(converted.state_dict() if form == "state_dict" else converted, source)
    kind = getattr(torch, dtype)
    words = (source, "--dtype", dtype, "-o", tmp_path / "out.safetensors", *SHAPE)
    # Which classes are in a module is the user's to say; a state dict needs the architecture.
    done = strip(*words, *(("--allow", "toys") if form == "module" else ARCH))
    assert done.exit_code == 0, done.output
    expected = ws.strip(converted).state_dict()
    for name, value in load_file(tmp_path / "out.safetensors").items():
        whole = expected[name]
        assert torch.equal(value, whole.to(kind) if whole.is_floating_point() else whole), name
    difference = float(done.stderr.partition("largest output difference ")[2].split()[0])
    assert (difference == 0) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_value_that_is_off_by_its_last_bit_is_refused_in_half_precision(
    dtype: str, trainers_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It moves the outputs by less than the rounding of the others does."""
    load = stripping.checkpoint.load

    def load_wrong(*args: Any, **options: Any) -> nn.Module:
        model = load(*args, **options)
        with torch.no_grad():
            model.head.weight[2, 3] *= 1 + torch.finfo(getattr(torch, dtype)).eps
        return model

    monkeypatch.setattr(stripping.checkpoint, "load", load_wrong)
    done = strip(trainers_file, *ARCH, *SHAPE, "--dtype", dtype)
    assert done.exit_code == 1, done.output
    assert (
        f"'head.weight' of the stripped model differs from its folded value rounded once to {dtype}"
        in (done.stderr)
    )
    assert names(tmp_path) == ["last.pth.tar"]


def test_a_rounding_that_overflows_the_outputs_is_refused() -> None:
    excited, rounded = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        rounded.bias.fill_(torch.inf)
    with pytest.raises(SurgeryError, match="not finite"):
        verification.rounding_effect(excited, rounded, (1, 3))


def test_a_value_beyond_the_dtype_is_named(converted: nn.Module, tmp_path: Path) -> None:
    converted.get_buffer("norm.running_var").fill_(1e6)
    torch.save(converted.state_dict(), tmp_path / "model.pt")
    done = strip(tmp_path / "model.pt", "--dtype", "float16")
    assert done.exit_code == 1
    assert "'norm.running_var' has a value of 1e+06, beyond the range of float16" in done.stderr
    assert names(tmp_path) == ["model.pt"]
    assert strip(tmp_path / "model.pt", "--dtype", "bfloat16").exit_code == 0


# What is compared.


def test_verify_takes_the_size_that_the_architecture_names(tmp_path: Path) -> None:
    import timm

    model = ws.convert(timm.create_model("test_resnet", in_chans=3), "lwe")
    ws.save(model, tmp_path / "model.we.pt", architecture="timm:test_resnet")
    done = strip(tmp_path / "model.we.pt", "--verify", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["input_shape"] == [1, *model.default_cfg["input_size"]]
    assert "as timm's configuration of the model says" in done.stderr
    assert found["report"]["relative_difference"] <= 1e-5


def test_sizes_of_torchvision_and_of_others() -> None:
    from we_surgery.checkpoint import Architecture

    for name, size in (("torchvision:inception_v3", 299), ("torchvision:unknown", 224)):
        shape, note = verification.input_shape_of(nn.Identity(), Architecture.parse(name))
        assert shape == (1, 3, size, size)
        assert "torchvision" in note[0]
    shape, note = verification.input_shape_of(nn.Identity(), None)
    assert shape == (1, 3, 224, 224)
    assert "does not name its input size" in note[0]


def test_verify_without_an_architecture_says_what_to_give(
    trainers_file: Path, tmp_path: Path
) -> None:
    done = strip(trainers_file, "--verify")
    assert (done.exit_code, "--arch" in done.stderr) == (2, True)
    assert names(tmp_path) == ["last.pth.tar"]


@pytest.mark.parametrize("words", [(), ("--dtype", "bfloat16")], ids=["as it was", "bfloat16"])
def test_the_file_that_was_written_is_what_is_run(
    words: tuple[str, ...], trainers_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An architecture that computes otherwise without excitation fails the proof."""
    forward = ConvNet.forward

    def biased(self: ConvNet, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + (type(self.stem) is nn.Conv2d)

    monkeypatch.setattr(ConvNet, "forward", biased)
    done = strip(trainers_file, *ARCH, "--verify", *words)
    assert done.exit_code == 1
    assert "outputs differ" in done.stderr
    assert names(tmp_path) == ["last.pth.tar"]


@pytest.mark.parametrize("form", ["module", "state_dict", "shards"])
def test_a_file_that_comes_back_changed_is_not_kept(
    form: str, converted: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "model.pt"
    if form == "shards":
        source = write_shards(converted.state_dict(), tmp_path / "in", 2)
    else:
        torch.save(converted.state_dict() if form == "state_dict" else converted, source)
    before = names(tmp_path)
    same = stripping.same_bits

    def unlike(a: torch.Tensor, b: torch.Tensor) -> bool:
        return same(a, b) and a.shape != (12, 4, 3, 3)

    monkeypatch.setattr(stripping, "same_bits", unlike)
    holds = SafetensorsWriter.holds
    monkeypatch.setattr(
        SafetensorsWriter,
        "holds",
        lambda self, name, tensor: holds(self, name, tensor) and name != "grouped.weight",
    )
    done = strip(source, "--allow", "toys")
    assert done.exit_code == 1, done.output
    assert "'grouped.weight'" in done.stderr
    assert "not bit-equal" in done.stderr
    assert names(tmp_path) == before


# What it says.


def test_it_ends_with_parity_and_checksum(trainers_file: Path, tmp_path: Path) -> None:
    done = strip(trainers_file, *ARCH, *SHAPE, "--json")
    target = tmp_path / "last.stripped.pth.tar"
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == f"sha256 {digest}  {target}"
    assert lines[-3].startswith("parity: all 14 tensors read back bit-equal; largest output")
    found = json.loads(done.stdout)
    assert found["sha256"] == {str(target): digest}
    assert (found["tensors"], found["input_shape"]) == (14, [2, 3, 8, 8])


@pytest.mark.parametrize("form", ["shards", "dcp"])
def test_a_sharded_checkpoint_gives_a_folder_beside_it(
    form: str, converted: nn.Module, tmp_path: Path
) -> None:
    state = converted.state_dict()
    if form == "dcp":
        source = write_dcp({"model": state, "step": 3}, tmp_path / "run")
    else:
        source = write_shards(state, tmp_path / "run", 3)
    done = strip(source, *ARCH, *SHAPE, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kind"] == "sharded"
    assert found["target"] == str(tmp_path / "run.stripped")
    assert found["report"]["output_difference"] == 0
    for path, digest in found["sha256"].items():
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    assert {Path(path).name for path in found["sha256"]} == set(names(tmp_path / "run.stripped"))
    loaded = ws.load(tmp_path / "run.stripped", architecture="toys:ConvNet")
    expected = ws.strip(converted).state_dict()
    assert all(torch.equal(value, expected[k]) for k, value in loaded.state_dict().items())


def test_a_sharded_checkpoint_gives_one_file_of_any_kind(
    converted: nn.Module, tmp_path: Path
) -> None:
    source = write_shards(converted.state_dict(), tmp_path / "run", 3)
    for words in (("-o", tmp_path / "out.safetensors"), ("-o", tmp_path / "out.pt")):
        done = strip(source, *words)
        assert done.exit_code == 0, done.output
        assert_vanilla(Path(words[1]), converted.state_dict())
    assert strip(source, "--to", "safetensors").exit_code == 0
    assert_vanilla(tmp_path / "run.stripped.safetensors", converted.state_dict())


def test_inspect_lists_the_excited_weights_of_a_sharded_checkpoint(
    converted: nn.Module, tmp_path: Path
) -> None:
    source = write_dcp({"model": converted.state_dict()}, tmp_path / "run")
    done = CliRunner().invoke(inspect_command, [str(source), "--json"])
    assert done.exit_code == 0, done.output
    torch.save(converted.state_dict(), tmp_path / "one.pt")
    one = CliRunner().invoke(inspect_command, [str(tmp_path / "one.pt"), "--json"])
    found, expected = json.loads(done.stdout), json.loads(one.stdout)
    assert (found["kind"], found["tensors"]) == ("dcp", expected["tensors"])
    assert found["layers"] == expected["layers"]


def test_a_paused_conversion_starts_as_the_vanilla_model(tmp_path: Path) -> None:
    model = ConvNet()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    words = [str(tmp_path / "model.pt"), *ARCH, "--start", "paused"]
    done = CliRunner().invoke(convert_command, words)
    assert done.exit_code == 0, done.output
    paused = ws.load(tmp_path / "model.we.pt", architecture="toys:ConvNet")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(paused.eval()(x), model.eval()(x))
    assert torch.equal(paused.stem.weight, paused.stem.raw_weight)
    assert ws.resume(paused) == 3
