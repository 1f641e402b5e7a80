"""Weights come back bit for bit, whatever happens while they are zero."""

from __future__ import annotations

import signal
import struct
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from we_surgery.analysis import decimation
from we_surgery.analysis.decimation import measured_without
from we_surgery.analysis.interrupts import HeldInterrupt

BITS = torch.tensor([-0.0, 1e-45, float("nan"), float("-inf"), 3.0, -1.5, 0.25, 2.0])


def parameters() -> list[nn.Parameter]:
    """A plain weight, one that is laid out channels last, and one in half precision."""
    odd = struct.unpack("<f", struct.pack("<I", 0x7FC0BEEF))[0]  # a NaN with a payload
    plain = torch.cat([BITS, torch.tensor([odd])]).reshape(3, 3)
    last = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(plain), nn.Parameter(last), nn.Parameter(torch.randn(5, 2).bfloat16())]


def bits(weights: list[nn.Parameter]) -> list[bytes]:
    return [
        weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if weight.dtype != torch.bfloat16
        else weight.detach().view(torch.int16).numpy().tobytes()
        for weight in weights
    ]


def cells_of(weights: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    return {weight: torch.arange(0, weight.numel(), 2) for weight in weights}


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is previous


def test_exactly_the_named_cells_are_zero_meanwhile() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    before = weight.detach().clone(memory_format=torch.contiguous_format).flatten()
    seen = measured_without(
        {weight: torch.tensor([0, 7, 47])}, lambda: weight.detach().contiguous().flatten().clone()
    )
    expected = before.clone()
    expected[[0, 7, 47]] = 0
    assert torch.equal(seen, expected)
    assert torch.equal(weight.detach().contiguous().flatten(), before)


def test_every_bit_comes_back() -> None:
    weights = parameters()
    before = bits(weights)
    measured_without(cells_of(weights), lambda: None)
    assert bits(weights) == before


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_every_bit_comes_back_after_a_fault(fault: BaseException) -> None:
    weights = parameters()
    before = bits(weights)

    def fail() -> None:
        assert bits(weights) != before
        raise fault

    with pytest.raises(type(fault)):
        measured_without(cells_of(weights), fail)
    assert bits(weights) == before


def test_ctrl_c_ends_the_measurement() -> None:
    weights = parameters()
    before, reached = bits(weights), []

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        measured_without(cells_of(weights), interrupted)
    assert bits(weights) == before
    assert not reached


class CtrlCAt:
    """Sends SIGINT at the nth line that runs in the two files."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.count = -1

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("decimation.py", "interrupts.py")):
            return None
        if "test_" in frame.f_code.co_filename:
            return None
        if event == "line" and "_handle" not in frame.f_code.co_name:
            self.count += 1
            if self.count == self.line:
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.mark.parametrize("metric_fails", [False, True])
def test_every_bit_comes_back_wherever_ctrl_c_hits(metric_fails: bool) -> None:
    def measure() -> float:
        if metric_fails:
            raise ValueError("no")
        return 1.0

    ended = []
    for line in range(200):
        weights = parameters()
        before, tracer, outer = bits(weights), CtrlCAt(line), sys.gettrace()
        sys.settrace(tracer)
        try:
            measured_without(cells_of(weights), measure)
        except (KeyboardInterrupt, ValueError) as error:
            ended.append(type(error))
        finally:
            sys.settrace(outer)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert bits(weights) == before, f"interrupted at line {line}"
        if tracer.count < line:  # all lines were hit
            break
    else:
        pytest.fail("the tracer never ran out of lines")
    # Every interrupt arrives in the end.
    assert ended.count(KeyboardInterrupt) >= line - 1


@pytest.mark.parametrize("at", ["hold", "give back", "both"])
def test_a_second_ctrl_c_does_not_end_the_giving_back(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, give_back = HeldInterrupt.hold, decimation._give_back

    def interrupted_hold(self: HeldInterrupt) -> None:
        signal.raise_signal(signal.SIGINT)
        hold(self)

    def interrupted_give_back(changed: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        give_back(changed)

    if at != "give back":
        monkeypatch.setattr(HeldInterrupt, "hold", interrupted_hold)
    if at != "hold":
        monkeypatch.setattr(decimation, "_give_back", interrupted_give_back)
    weights = parameters()
    before = bits(weights)
    with pytest.raises(KeyboardInterrupt):
        measured_without(cells_of(weights), lambda: signal.raise_signal(signal.SIGINT))
    assert bits(weights) == before


def test_other_threads_measure_without_signals() -> None:
    weight, seen = nn.Parameter(torch.ones(2)), []
    thread = threading.Thread(
        target=lambda: seen.append(
            measured_without({weight: torch.tensor([0])}, lambda: weight.tolist())
        )
    )
    thread.start()
    thread.join()
    assert seen == [[0.0, 1.0]]
    assert weight.tolist() == [1.0, 1.0]


def test_an_ignored_interrupt_stays_ignored() -> None:
    weight = nn.Parameter(torch.ones(2))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        measured_without({weight: torch.tensor([0])}, lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert weight.tolist() == [1.0, 1.0]
