"""Faults midway: the model in memory and the files on the disk are as they were before."""

from __future__ import annotations

import copy
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from toys import EVERYTHING, ZOO_INPUT, Zoo

import we_surgery as ws
from we_surgery.checkpoint import staging as staging_module
from we_surgery.checkpoint.safe_pickle import unpickle as unpickle_module
from we_surgery.cli import convert_command, strip_command
from we_surgery.converted import excite
from we_surgery.converted import strip as stripping
from we_surgery.converted.state import stored_plan
from we_surgery.excitations import Composition

FAULTS = [RuntimeError("injected"), MemoryError(), torch.OutOfMemoryError("injected")]
ROWS = len(ws.plan(Zoo(), config=EVERYTHING).excited)


def description(model: nn.Module) -> list[Any]:
    return [
        # "kept" is an excited weight that was computed in eval mode.
        [
            (name, id(m), type(m), m.training, vars(m).keys() - {"kept"})
            for name, m in model.named_modules()
        ],
        [(name, id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        list(model.state_dict()),
    ]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, values = description(model), copy.deepcopy(model.state_dict())
    yield
    assert description(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


class FailsAt:
    """Calls a function, and raises at its n-th call, before or after."""

    def __init__(self, function: Any, n: int, fault: BaseException, after: bool = False) -> None:
        self.function, self.n, self.fault, self.after = function, n, fault, after
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.n + 1 and not self.after:
            raise self.fault
        result = self.function(*args, **kwargs)
        if self.calls == self.n + 1:
            raise self.fault
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("row", range(ROWS))
@pytest.mark.parametrize("inplace", [False, True])
def test_a_fault_at_any_row_of_a_plan_leaves_the_model_as_it_was(
    row: int, inplace: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Zoo()
    failing = FailsAt(excite.excite_owner, row, FAULTS[row % len(FAULTS)], after)
    monkeypatch.setattr(excite, "excite_owner", failing)
    with unchanged(model), pytest.raises(type(failing.fault)):
        ws.convert(model, config=EVERYTHING, inplace=inplace)
    assert failing.calls == row + 1


@pytest.mark.parametrize("row", range(ROWS))
@pytest.mark.parametrize("inplace", [False, True])
def test_a_fault_at_any_fold_leaves_the_model_converted(
    row: int, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ws.convert(Zoo(), config=EVERYTHING)
    failing = FailsAt(stripping.check_fold, row, FAULTS[row % len(FAULTS)])
    monkeypatch.setattr(stripping, "check_fold", failing)
    with unchanged(model), pytest.raises(type(failing.fault)):
        ws.strip(model, inplace=inplace)
    assert failing.calls == row + 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("call", [0, 3, 6])
def test_no_memory_while_a_weight_is_computed(
    call: int, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(ZOO_INPUT)
    vanilla, converted = Zoo(), ws.convert(Zoo(), config=EVERYTHING)
    failing = FailsAt(Composition.forward, call, fault)

    def forward(self: Composition, weight: Tensor) -> Tensor:
        return failing(self, weight)

    monkeypatch.setattr(Composition, "forward", forward)
    with unchanged(converted), pytest.raises(Exception):  # noqa: B017, PT011
        ws.strip(converted, example_inputs=x, inplace=True)
    assert failing.calls > call
    failing.calls = 0
    with unchanged(vanilla), pytest.raises(Exception):  # noqa: B017, PT011
        ws.convert(vanilla, config=EVERYTHING, init="preserve", example_inputs=x, inplace=True)
    assert failing.calls > call


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


@pytest.mark.parametrize("size", [0, 3000, 60_000])
@pytest.mark.parametrize("to", ["module", "state_dict", "safetensors"])
def test_a_full_disk_leaves_the_files_as_they_were(to: str, size: int, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(200, 200)), tmp_path / "model.pt")
    target = tmp_path / ("out.safetensors" if to == "safetensors" else "out.pt")
    target.write_bytes(b"before")
    before = contents(tmp_path)
    arguments = [str(tmp_path / "model.pt"), "-o", str(target), "--force", "--to", to]
    with largest_file(size):
        result = CliRunner().invoke(convert_command, arguments)
    assert result.exit_code == 1, result.output
    assert "could not be written" in result.stderr
    assert "disk" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_in_the_middle_of_a_write_leaves_the_target_as_it_was(
    number: signal.Signals, tmp_path: Path
) -> None:
    torch.save(ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "lwe"), tmp_path / "model.pt")
    (tmp_path / "out.pt").write_bytes(b"before")
    before = contents(tmp_path)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child has none of
        child = os.fork()
    if not child:
        # The child: stops after it has written and before the file gets its name.
        staging_module.sync = lambda *args: time.sleep(60)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup.
        arguments = [str(tmp_path / "model.pt"), "-o", str(tmp_path / "out.pt"), "--force"]
        try:
            strip_command.main(arguments, standalone_mode=False)
        finally:
            os._exit(3)
    while not any(f.stat().st_size for f in tmp_path.glob(".we_surgery-*/*")):
        assert time.monotonic() < started + 60
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(child, number)
    os.waitpid(child, 0)
    left = contents(tmp_path)
    # Nothing can be done after a kill; what is left then is plainly none of the user's.
    temporary = [name for name in left if name.startswith(".we_surgery-")]
    assert len(temporary) == (number == signal.SIGKILL)
    assert {name: left[name] for name in left if name not in temporary} == before


def test_a_file_replaced_while_it_is_read_is_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hostile = tmp_path / "model.pt", tmp_path / "hostile.pt"
    torch.save(nn.Linear(2, 2), path)
    torch.save(nn.Linear(2, 2).register_forward_hook(print), hostile)

    def look(*args: Any) -> Any:
        permitted = permit(*args)
        if hostile.exists():
            hostile.replace(path)
        return permitted

    permit = unpickle_module.permit
    monkeypatch.setattr(unpickle_module, "permit", look)
    assert type(ws.load(path)) is nn.Linear
    with pytest.raises(ws.errors.InputError):
        ws.load(path)


def fork(*commands: list[str]) -> list[int]:
    """Runs `we-convert` or `we-strip` in processes of their own."""
    children = []
    for command, *arguments in commands:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            code = 3
            try:
                script = {"convert": convert_command, "strip": strip_command}[command]
                code = CliRunner().invoke(script, arguments).exit_code
            finally:
                os._exit(code)
        children.append(child)
    return children


def exit_codes(children: list[int]) -> set[int]:
    return {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}


def test_converts_of_one_file_at_one_time_leave_one_whole_file(tmp_path: Path) -> None:
    model, target = tmp_path / "model.pt", tmp_path / "out.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 64, 3)), model)
    modes = ["lwe", "mwe", "lwe+mwe"]
    command = ["convert", str(model), "-o", str(target), "--force", "--mode"]
    children = fork(*([*command, mode] for mode in modes))
    codes: list[int] = []
    while len(codes) < len(children):
        # Whatever a reader finds at any moment is a whole file of one of them.
        if target.exists():
            assert stored_plan(ws.load(target)).mode in modes
        child, status = os.waitpid(-1, os.WNOHANG)
        codes += [os.waitstatus_to_exitcode(status)] if child in children else []
    assert set(codes) == {0}
    assert stored_plan(ws.load(target)).mode in modes
    assert sorted(contents(tmp_path)) == ["model.pt", "out.pt"]


def test_a_strip_while_training_writes_is_of_one_whole_checkpoint_or_none(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pt"
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 64, 3)), "mwe")

    def train() -> None:
        with torch.no_grad():
            model[0].raw_weight.add_(1)
        torch.save(model.state_dict(), checkpoint)  # as trainers do, in place

    train()
    targets = [tmp_path / f"out{i}.pt" for i in range(8)]
    children = fork(*(["strip", str(checkpoint), "-o", str(target)] for target in targets))
    for _ in range(300):
        train()
    assert exit_codes(children) <= {0, 1, 2}
    for target in targets:
        if target.exists():
            assert torch.load(target)["0.weight"].isfinite().all()
    assert not list(tmp_path.glob(".we_surgery-*"))
