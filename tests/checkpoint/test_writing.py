import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from we_surgery.checkpoint import (
    check_target,
    read,
    staged,
)
from we_surgery.checkpoint import staging as staging_module
from we_surgery.checkpoint import write as write_file
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter
from we_surgery.errors import InputError, SurgeryError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}

WRITERS = {
    "module": lambda path, **options: write_file(nn.Linear(3, 2), path, "module", **options),
    "state_dict": lambda path, **options: write_file(STATE, path, "state_dict", **options),
    "safetensors": lambda path, **options: write_file(STATE, path, "safetensors", **options),
}


@pytest.fixture(params=WRITERS, ids=list(WRITERS))
def write(request):
    return WRITERS[request.param]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_nothing_beside_it(write, tmp_path):
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    read(tmp_path / "out")


def test_an_existing_file_needs_force(write, tmp_path):
    (tmp_path / "out").write_text("before")
    with pytest.raises(InputError, match="exists already") as caught:
        write(tmp_path / "out")
    assert "--force" in caught.value.cure
    assert (tmp_path / "out").read_text() == "before"
    write(tmp_path / "out", force=True)
    read(tmp_path / "out")


def test_the_mode_follows_the_umask(write, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["write", "sync", "replace"])
def test_a_failure_midway_leaves_the_target_as_it_was(write, step, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("before")

    def fail(*args, **kwargs):
        if step == "write" and args and hasattr(args[-1], "write"):
            args[-1].write(b"half of it")
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr(torch, "save", fail)
        monkeypatch.setattr(SafetensorsWriter, "write", fail)
    elif step == "sync":
        monkeypatch.setattr(staging_module, "sync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SurgeryError, match="No space left"):
        write(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "before"


def test_an_interrupt_leaves_no_temporary_file(write, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(staging_module, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert names(tmp_path) == []


def test_the_target_is_never_there_half_written(write, tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync

    def watch(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append((is_folder, (tmp_path / "out").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write(tmp_path / "out")
    # The file is synced before it gets its name, and the folder after.
    assert seen == [(False, False), (True, True)]


def test_a_module_that_cannot_be_pickled_says_so_and_leaves_nothing(tmp_path):
    model = nn.Linear(2, 2)
    model.activation = lambda x: x
    with pytest.raises(SurgeryError, match="cannot be pickled") as caught:
        write_file(model, tmp_path / "out.pt", "module")
    assert "state dict" in caught.value.cure
    assert names(tmp_path) == []


def test_targets_that_cannot_be_written_are_refused_beforehand(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        check_target(tmp_path / "missing" / "out.pt", force=True)
    with pytest.raises(InputError, match="not a regular file"):
        check_target("/dev/null", force=True)
    with pytest.raises(InputError, match="cannot be written"):
        check_target(tmp_path / ("a" * 5000))
    check_target(tmp_path / "out.pt")


def test_a_pipe_or_device_is_refused_and_so_is_a_link_to_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match="not a regular file"):
            check_target(tmp_path / name, force=True)


def test_a_loop_of_links_is_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(other)
    with pytest.raises(InputError, match="cannot be written"):
        check_target(tmp_path / "a", force=True)


def test_behind_a_link_the_file_that_it_names_is_replaced(write, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("before")
    (tmp_path / "out").symlink_to(Path("real", "file"))
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "out")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").readlink() == Path("real", "file")
    assert names(tmp_path / "real") == ["file"]
    read(tmp_path / "real" / "file")


def test_a_file_that_appears_meanwhile_stays(tmp_path):
    staging = staged(tmp_path / "out")
    staging.__enter__().write_text("ours")
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        staging.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "precious"


def test_a_file_that_appears_at_the_last_moment_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(staging_module, "check_target", lambda *args, **options: None)
    (tmp_path / "out").write_text("precious")
    with (
        pytest.raises(InputError, match="exists already"),
        staged(tmp_path / "out") as temporary,
    ):
        temporary.write_text("ours")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "precious"


@pytest.fixture(params=["links", "plain"])
def system(request, monkeypatch):
    """File systems that have links, and that have none."""

    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    if request.param == "plain":
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    return request.param


def test_a_file_is_written_and_replaced_on_any_file_system(write, system, tmp_path):
    for _ in range(2):
        write(tmp_path / "out", force=True)
        assert names(tmp_path) == ["out"]
        read(tmp_path / "out")


def test_a_folder_is_replaced_on_any_file_system(system, shards, tmp_path):
    with staged(shards, force=True, folder=True) as temporary:
        (temporary / "model.safetensors").write_text("after")
    assert names(tmp_path) == ["out"]
    assert (shards / "model.safetensors").read_text() == "after"


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("before")
    return tmp_path / "out"


def test_a_folder_keeps_what_appears_in_it_meanwhile(shards, tmp_path):
    staging = staged(shards, force=True, folder=True)
    (staging.__enter__() / "model.safetensors").write_text("after")
    (shards / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match="would delete files"):
        staging.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert names(shards) == ["model.safetensors", "notes.txt"]


def test_a_folder_that_appears_meanwhile_stays(tmp_path):
    with (
        pytest.raises(InputError, match="exists already"),
        staged(tmp_path / "out", folder=True),
    ):
        (tmp_path / "out").mkdir()
    assert names(tmp_path) == ["out"]


def test_behind_a_link_the_folder_that_it_names_is_replaced(shards, tmp_path):
    (tmp_path / "link").symlink_to(shards)
    with staged(tmp_path / "link", force=True, folder=True) as temporary:
        (temporary / "model.safetensors").write_text("after")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "out"]
    assert (shards / "model.safetensors").read_text() == "after"


def test_a_folder_moved_aside_is_kept_where_another_takes_its_name(shards, tmp_path, monkeypatch):
    replace = Path.replace

    def late(path, target):
        (shards / "precious").mkdir(parents=True)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", late)
    with (
        pytest.raises(SurgeryError, match="could not be put back"),
        staged(shards, force=True, folder=True) as temporary,
    ):
        (temporary / "model.safetensors").write_text("after")
    assert names(shards) == ["precious"]
    (aside,) = tmp_path.glob(".we_surgery-*.tmp/out.old/model.safetensors")
    assert aside.read_text() == "before"


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_a_signal_during_a_swap_leaves_one_whole_folder(after, done, shards, tmp_path, monkeypatch):
    calls = []

    def interrupted(method):
        original = getattr(Path, method)

        def call(path, target):
            calls.append(target)
            if len(calls) != after:
                return original(path, target)
            if done:
                original(path, target)
            raise KeyboardInterrupt

        return call

    for method in ("rename", "replace"):
        monkeypatch.setattr(Path, method, interrupted(method))
    with (
        pytest.raises(KeyboardInterrupt),
        staged(shards, force=True, folder=True) as temporary,
    ):
        (temporary / "model.safetensors").write_text("after")
    assert names(tmp_path) == ["out"]
    assert (shards / "model.safetensors").read_text() == "before"


def test_mounts_that_refuse_to_sync_folders_are_written_to(write, tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "refused")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path / "out")
    read(tmp_path / "out")


@pytest.mark.parametrize(("source", "expected"), [(0o600, 0o600), (0o640, 0o640), (0o444, 0o644)])
def test_who_cannot_read_the_source_cannot_read_the_target(source, expected, tmp_path):
    (tmp_path / "source").touch()
    (tmp_path / "source").chmod(source)
    before = os.umask(0o022)
    try:
        with staged(tmp_path / "out", like=tmp_path / "source"):
            pass
        with staged(tmp_path / "folder", folder=True, like=tmp_path / "source"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == expected
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == expected | (expected & 0o444) >> 2


def test_what_is_replaced_keeps_its_mode(write, shards, tmp_path):
    (tmp_path / "private").touch(mode=0o600)
    write(tmp_path / "private", force=True)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    shards.chmod(0o700)
    with staged(shards, force=True, folder=True) as temporary:
        # What is private is so while it is written, too.
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(shards.stat().st_mode) == 0o700


@pytest.mark.parametrize("error", [RuntimeError("of a fold"), MemoryError()])
def test_only_errors_of_the_disk_are_called_so(error, tmp_path):
    with pytest.raises(type(error)), staged(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_target(tmp_path / "out.pt")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match="not writable"):
        check_target(tmp_path / "out.pt")
