"""Whole networks of shifts: TSM-ResNet50, the Shift network's block, S2-MLP's and AS-MLP's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shift_modules import axial, spatial_slice_assignment
from torch import Tensor, nn
from tsm import tsm_resnet50

import we_surgery as ws
from we_surgery.reading import read

SEGMENTS = 4


@pytest.mark.parametrize(
    ("variant", "fed"),
    # Around a whole block the identity path is shifted too: its downsampling conv, of which
    # there are four, is fed as well.
    [("residual", 16), ("in place", 16), ("block", 20)],
)
def test_tsm_resnet50_has_its_shift_fed_convs_and_no_other(variant: str, fed: int) -> None:
    with torch.device("meta"):
        model = tsm_resnet50(variant, SEGMENTS)
    reading = read(model, torch.randn(SEGMENTS, 3, 64, 64))
    found = [layer for layer in reading.layers if layer.shift is not None]
    assert len(found) == fed
    assert all("conv1" in layer.name or "downsample" in layer.name for layer in found)
    assert "conv1" not in {layer.name for layer in found}
    assert {layer.shift for layer in found} == {"channels displaced along dim 1 by -1, 0, +1"}


class ShiftBlock(nn.Module):
    """Wu et al.: 1x1, norm, activation, shift of each channel in 3x3, 1x1."""

    def __init__(self, channels: int = 18) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.expand(x)))
        h, w = maps.shape[2:]
        padded = F.pad(maps, (1, 1, 1, 1))
        moved = [
            padded[:, c : c + 1, c // 3 % 3 : c // 3 % 3 + h, c % 3 : c % 3 + w]
            for c in range(maps.shape[1])
        ]
        return x + self.project(torch.cat(moved, 1))


class MixerBlock(nn.Module):
    """S2-MLP and AS-MLP on channels-last maps: linear, movement, linear."""

    def __init__(self, move: str) -> None:
        super().__init__()
        self.expand = nn.Linear(4, 9)
        self.project = nn.Linear(9, 4)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        maps = F.gelu(self.expand(x)).permute(0, 3, 1, 2)
        maps = axial(maps) if self.move == "axial" else spatial_slice_assignment(maps)
        return x + self.project(maps.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (lambda: ShiftBlock(), (2, 4, 6, 6)),
        (lambda: MixerBlock("axial"), (2, 6, 6, 4)),
        (lambda: MixerBlock("s2"), (2, 6, 6, 4)),
    ],
    ids=["shift network", "as-mlp", "s2-mlp"],
)
def test_the_projection_after_the_movement_is_shift_fed(block, shape: tuple[int, ...]) -> None:
    plan = ws.plan(block(), "we", example_inputs=torch.randn(shape))
    rows = {row.layer: row for row in plan.decisions}
    assert "shift-fed: channels displaced along dim" in rows["project"].reason
    assert rows["project"].stages == ("mwe",)
    assert "shift-fed" not in rows["expand"].reason


def test_a_shift_fed_linear_layer_gets_what_linear_layers_get() -> None:
    for mode, stages in {"lwe": ("mwe",), "we": ("mwe",), "none": ()}.items():
        plan = ws.plan(MixerBlock("axial"), mode, example_inputs=torch.randn(2, 6, 6, 4))
        row = next(row for row in plan.decisions if row.layer == "project")
        assert row.stages == stages
        assert "linear: no kernel locations; shift-fed: channels displaced" in row.reason
