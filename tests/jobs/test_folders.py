"""A folder in is a folder out: weights replaced, everything else copied, or nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sharded_files import assert_holds, write_shards
from toys import ConvNet

import we_surgery as ws
from we_surgery.cli import convert_command, strip_command

OTHERS = {
    "config.json": b"{}",
    "tokenizer.json": b"[1]",
    "1_Pooling/config.json": b"{}",
    "adapter_model.safetensors": b"an adapter",
}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def excited(tmp_path: Path) -> Path:
    """A folder of one excited safetensors file, among others."""
    folder = tmp_path / "run"
    for name, content in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    state = ws.convert(ConvNet(), "lwe").state_dict()
    save_file(state, folder / "model.safetensors")
    return folder


def strip(*words: object):
    return CliRunner().invoke(strip_command, [str(word) for word in words])


def test_strip_replaces_the_weights_and_copies_the_rest(excited: Path) -> None:
    before = tree(excited)
    result = strip(excited, "--json")
    assert result.exit_code == 0, result.output
    out = excited.with_name("run.stripped")
    assert tree(excited) == before
    written = tree(out)
    assert {name: content for name, content in written.items() if name in OTHERS} == OTHERS
    assert written.keys() == before.keys()
    expected = ws.strip_state_dict(load_file(excited / "model.safetensors"))
    assert_holds(load_file(out / "model.safetensors"), expected)
    found = json.loads(result.stdout)
    assert (found["target"], found["notes"]) == (str(out), [])
    assert found["sha256"].keys() == {str(out / name) for name in written}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_keep_what_lies_beside_them(excited: Path, ending: str) -> None:
    state = load_file(excited / "model.safetensors")
    sharded = excited.with_name("sharded")
    write_shards(state, sharded, 2, ending)
    (sharded / "config.json").write_text("{}")
    assert strip(sharded, "-o", f"{excited.parent}/out/").exit_code == 0
    out = excited.with_name("out")
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    vanilla = ws.load(out, architecture="toys:ConvNet").state_dict()
    assert_holds(vanilla, ws.strip_state_dict(state))


def test_a_file_of_torch_save_stays_one(excited: Path) -> None:
    state = load_file(excited / "model.safetensors")
    (excited / "model.safetensors").unlink()
    torch.save(state, excited / "pytorch_model.bin")
    assert strip(excited, "--verify", "--arch", "toys:ConvNet", "--input-shape", "1,3,8,8").output
    out = excited.with_name("run.stripped")
    assert tree(out).keys() == {*OTHERS, "pytorch_model.bin"}
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert_holds(found, ws.strip_state_dict(state))


def test_the_name_of_a_file_gives_one_file(excited: Path) -> None:
    assert strip(excited, "-o", excited.with_name("one.safetensors")).exit_code == 0
    assert excited.with_name("one.safetensors").is_file()


def test_what_would_mislead_is_left_out_and_named(excited: Path, tmp_path: Path) -> None:
    torch.save({}, excited / "pytorch_model.bin")
    torch.save({}, excited / "optimizer.pt")
    (excited / ".git").mkdir()
    (excited / "linked").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "vocabulary.txt").write_text("a b")
    (excited / "vocab.txt").symlink_to(tmp_path / "vocabulary.txt")
    result = strip(excited)
    out = excited.with_name("run.stripped")
    assert tree(out).keys() == {*OTHERS, "model.safetensors", "vocab.txt"}
    assert not (out / "vocab.txt").is_symlink()
    for name in (".git", "linked", "optimizer.pt", "pytorch_model.bin"):
        assert f"'{name}'" in result.stderr


def test_nothing_is_overwritten_without_force_nor_lost_with_it(excited: Path) -> None:
    out = excited.with_name("run.stripped")
    assert strip(excited).exit_code == 0
    (excited / "config.json").write_text('{"a": 1}')
    before = tree(out)
    assert "exists already" in strip(excited).stderr
    assert tree(out) == before
    assert strip(excited, "--force").exit_code == 0
    assert tree(out) == before | {"config.json": b'{"a": 1}'}
    (out / "1_Pooling" / "notes.txt").write_text("mine")
    result = strip(excited, "--force")
    assert (result.exit_code, "1_Pooling/notes.txt" in result.stderr) == (2, True)
    assert (out / "1_Pooling" / "notes.txt").read_text() == "mine"


def test_the_folder_itself_may_be_replaced_but_not_written_into(excited: Path) -> None:
    state = load_file(excited / "model.safetensors")
    result = strip(excited, "-o", excited / "inner")
    assert (result.exit_code, "lies inside the input folder" in result.stderr) == (2, True)
    assert strip(excited, "-o", excited, "--force").exit_code == 0
    assert {k: v for k, v in tree(excited).items() if k in OTHERS} == OTHERS
    assert_holds(load_file(excited / "model.safetensors"), ws.strip_state_dict(state))


def test_a_failure_leaves_no_folder(excited: Path) -> None:
    state = load_file(excited / "model.safetensors")
    state["stem.raw_weight"][0] = float("nan")
    save_file(state, excited / "model.safetensors")
    assert strip(excited).exit_code == 1
    assert [path.name for path in excited.parent.iterdir()] == ["run"]


def test_an_unreadable_companion_leaves_no_folder(
    excited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(source: Path, target: Path) -> None:
        raise OSError("bad sector")

    monkeypatch.setattr(shutil, "copy", copy)
    result = strip(excited)
    assert (result.exit_code, "bad sector" in result.stderr) == (1, True)
    assert [path.name for path in excited.parent.iterdir()] == ["run"]


def test_convert_and_strip_give_back_the_folder(tmp_path: Path) -> None:
    source = tmp_path / "vanilla"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(ConvNet().state_dict(), source / "model.safetensors")
    words = [str(source), "--arch", "toys:ConvNet", "--init", "preserve"]
    assert CliRunner().invoke(convert_command, words).exit_code == 0
    excited = tmp_path / "vanilla.we"
    assert tree(excited).keys() == {"config.json", "model.safetensors"}
    assert "stem.raw_weight" in load_file(excited / "model.safetensors")
    assert strip(excited).exit_code == 0
    assert tree(tmp_path / "vanilla.stripped").keys() == {"config.json", "model.safetensors"}
