"""Shift-fed convs are found by what the data does."""

from __future__ import annotations

import pytest
import torch
from shift_modules import DECOYS, SHIFTS
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.reading import read

NOT_TRACEABLE = {
    "tsm slice assignment",
    "tsm autograd function",
    "s2 slice assignment",
    "five-dimensional",
    "channels-last linear",
}
if torch.__version__.startswith("2.8."):  # its arange takes no number that is traced
    NOT_TRACEABLE.add("gather")


def shift_of(model: nn.Module, shape: tuple[int, ...], name: str = "target") -> str | None:
    reading = read(model, torch.randn(shape))
    assert reading.read_by == "recorded"
    (facts,) = [layer for layer in reading.layers if layer.name == name]
    return facts.shift


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_found_however_it_is_written(name: str) -> None:
    make, shape = SHIFTS[name]
    assert "channels displaced along dim" in str(shift_of(make(), shape))


@pytest.mark.parametrize("name", DECOYS)
def test_other_movements_are_no_shift(name: str) -> None:
    make, shape = DECOYS[name]
    assert shift_of(make(), shape) is None


@pytest.mark.parametrize("name", [name for name in SHIFTS if name not in NOT_TRACEABLE])
def test_a_shift_that_can_be_traced_needs_no_example_inputs(name: str) -> None:
    reading = read(SHIFTS[name][0]())
    assert reading.read_by == "symbolic"
    (facts,) = [layer for layer in reading.layers if layer.name == "target"]
    assert "channels displaced along dim" in str(facts.shift)


@pytest.mark.parametrize("name", sorted(NOT_TRACEABLE))
def test_a_model_that_cannot_be_traced_says_what_stopped_it(name: str) -> None:
    reading = read(SHIFTS[name][0]())
    assert "shift_modules.py:" in reading.read_by_reason


@pytest.mark.parametrize("name", DECOYS)
def test_tracing_takes_no_other_movement_for_a_shift(name: str) -> None:
    reading = read(DECOYS[name][0]())
    assert reading.read_by == "symbolic"
    assert all(layer.shift is None for layer in reading.layers)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tsm slice assignment", "channels displaced along dim 1 by -1, 0, +1"),
        ("five-dimensional", "channels displaced along dim 2 by -1, 0, +1"),
        ("channels-last linear", "channels displaced along dim 1 by -1, +1"),
        (
            "s2 slice assignment",
            "channels displaced along dims 2 and 3 by -1/0, 0/-1, 0/+1, +1/0",
        ),
    ],
)
def test_the_displacement_is_named(name: str, said: str) -> None:
    make, shape = SHIFTS[name]
    assert shift_of(make(), shape) == said


def test_only_the_fed_layer_is_marked() -> None:
    make, shape = SHIFTS["roll"]
    assert shift_of(make(), shape, "first") is None


@pytest.mark.parametrize(("mode", "stages"), [("lwe", ()), ("we", ("mwe",)), ("mwe", ("mwe",))])
def test_lwe_skips_shift_fed_convs_and_the_other_modes_give_mwe(
    mode: str, stages: tuple[str, ...]
) -> None:
    make, shape = SHIFTS["roll"]
    plan = ws.plan(make(), mode, example_inputs=torch.randn(shape))
    (row,) = [row for row in plan.decisions if row.layer == "target"]
    assert row.stages == stages
    assert row.reason.startswith("shift-fed: channels displaced along dim 3 by -1, 0, +1")


def test_a_conv_called_on_shifted_and_unshifted_inputs_counts_as_shift_fed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.target = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            left, right = x.chunk(2, 1)
            return self.target(x) + self.target(torch.cat([left.roll(1, 3), right], 1))

    said = shift_of(Both(), (2, 3, 6, 6))
    assert said == "channels displaced along dim 3 by -1, 0 in 2 of 4 reads"
