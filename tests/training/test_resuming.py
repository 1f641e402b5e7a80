"""Training is killed between and within steps, and goes on bit for bit."""

import importlib.util
import io
import multiprocessing
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_training.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume_training", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_and_die(folder: Path, place: str, at: int) -> None:
    """Runs the example until this process is killed at its checkpoint of that number."""
    torch.set_num_threads(1)
    saves = 0
    really_save, really_replace = torch.save, os.replace

    def save(state: Any, path: Path) -> None:
        nonlocal saves
        saves += 1
        if (place, saves) == ("half written", at):
            whole = io.BytesIO()
            really_save(state, whole)
            path.write_bytes(whole.getvalue()[: whole.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        really_save(state, path)

    def replace(source: Path, target: Path) -> None:
        if (place, saves) == ("not renamed", at):
            os.kill(os.getpid(), signal.SIGKILL)
        really_replace(source, target)
        if (place, saves) == ("saved", at):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, os.replace = save, replace
    example().main(folder)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    folder = tmp_path_factory.mktemp("straight")
    losses = example().main(folder)
    assert len(set(losses)) == len(losses) == 12
    return losses, torch.load(folder / "last.pt", weights_only=True)


# Excitation sets in after the fourth step.
@pytest.mark.parametrize(
    ("place", "at", "done"),
    [
        ("half written", 3, 2),
        ("saved", 4, 4),
        ("not renamed", 5, 4),
        ("saved", 10, 10),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    place: str, at: int, done: int, straight: tuple[list[float], Any], tmp_path: Path
) -> None:
    # Not forked from this process, whose threads a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "we_surgery"])
    process = context.Process(target=train_and_die, args=(tmp_path, place, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    losses, state = straight
    assert example().main(tmp_path) == losses[done:]
    assert_same(torch.load(tmp_path / "last.pt", weights_only=True), state)
