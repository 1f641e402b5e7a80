"""`we-strip --both` under a fault at each of its calls to the file system: both files or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import we_surgery as ws
from we_surgery.cli import strip_command

CALLS = ["fsync", "rename", "replace", "link", "mkdir", "chmod", "unlink", "rmdir", "lstat"]
FILES = ("last.stripped.pt", "last.stripped.ema.pt")


class FailsOnce:
    """Stands for functions of `os`, and fails at the n-th call of any of them, done or not."""

    def __init__(self, n: int, fault: BaseException, *, done: bool, folder: Path) -> None:
        self.n, self.fault, self.done, self.folder = n, fault, done, folder
        self.calls = 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            ours = isinstance(arguments[0], int) or Path(arguments[0]).is_relative_to(self.folder)
            self.calls += ours
            if not ours or self.calls != self.n:
                return function(*arguments, **options)
            if self.done:
                function(*arguments, **options)
            raise self.fault

        return call


def pair(folder: Path) -> list[bytes | None]:
    return [(folder / n).read_bytes() if (folder / n).exists() else None for n in FILES]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ws.convert(nn.Sequential(nn.Conv2d(1, 2, 1)), "mwe")
    path = tmp_path_factory.mktemp("source") / "last.pt"
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()}, path)
    return path


DISK, INTERRUPT = OSError(errno.EIO, "I/O error"), KeyboardInterrupt()


# Each pair of the three choices.
@pytest.mark.parametrize(
    ("existing", "done", "fault"),
    [
        (False, False, DISK),
        (False, True, INTERRUPT),
        (True, False, INTERRUPT),
        (True, True, DISK),
    ],
)
def test_both_or_none(
    existing: bool,
    done: bool,
    fault: BaseException,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran_through = False
    n = 0
    while not ran_through:
        n += 1
        folder = tmp_path / str(n)
        folder.mkdir()
        if existing:
            for name in FILES:
                (folder / name).write_bytes(b"before")
        before = pair(folder)
        failing = FailsOnce(n, fault, done=done, folder=folder)
        arguments = [str(source), "--both", "--force", "-o", str(folder / FILES[0])]
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing.of(getattr(os, name)))
            result = CliRunner().invoke(strip_command, arguments)
        ran_through = failing.calls < n
        after = pair(folder)
        assert all(a != b for a, b in zip(after, before, strict=True)) or after == before, n
        if after == before:
            assert result.exit_code != 0, n
        elif result.exit_code:
            assert "as it was" not in result.stderr, n
            assert "as they were" not in result.stderr, n
    assert n > 20
    assert result.exit_code == 0, result.output


def test_a_file_that_appears_meanwhile_leaves_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def late(source: Path, target: Path) -> None:
        if Path(target).name == FILES[1]:
            Path(target).write_bytes(b"precious")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    arguments = [str(source), "--both", "-o", str(tmp_path / FILES[0])]
    result = CliRunner().invoke(strip_command, arguments)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {FILES[1]: b"precious"}
