"""Forward hooks: those that a model computes by are run in a recording, others are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.reading.recorded import record_both_modes

X = torch.randn(2, 3, 8, 8)


class Grabber(nn.Module):
    """Reads the map that a hook of its own has put aside."""

    def __init__(self, *, bound: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head = nn.Conv2d(4, 5, 1)
        self.maps: dict[str, Tensor] = {}
        hook = self.grab if bound else functools.partial(self.grab_as, "first")
        self.body[0].register_forward_hook(hook)

    def grab(self, *arguments: Any) -> None:
        self.maps["first"] = arguments[-1]

    def grab_as(self, name: str, *arguments: Any) -> None:
        self.maps[name] = arguments[-1]

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(self.maps["first"])


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_hooks_that_are_methods_are_part_of_the_model(bound: bool, has_run: bool) -> None:
    model = Grabber(bound=bound)
    if has_run:
        with torch.no_grad():
            model(X)
    maps = dict(model.maps)
    plan = ws.plan(model, example_inputs=X)
    assert (plan.read_by, plan.read_by_reason) == ("recorded", "")
    assert [row.layer for row in plan.excited] == ["body.0", "head"]
    converted = ws.convert(model, example_inputs=X)
    ws.strip(converted, example_inputs=X)
    assert model.maps == maps


def pad(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (F.pad(arguments[0], (0, 0, 0, 0, 0, 1)),)


def test_functions_are_run_where_the_model_fails_without_them() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model.register_forward_pre_hook(pad)
    plan = ws.plan(model, example_inputs=X)
    assert (plan.read_by, plan.read_by_reason) == ("recorded", "")
    ws.strip(ws.convert(model, example_inputs=X), example_inputs=X)


def test_segformer_is_read_as_well_once_it_has_run() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    before = ws.plan(model, example_inputs=inputs)
    model(**inputs)
    assert before.read_by == "recorded"
    assert ws.plan(model, example_inputs=inputs) == before
    ws.convert(model, example_inputs=inputs)


class NeverTrains(nn.Module):
    """Fails in train mode, whatever hooks are run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("not in this mode")
        return self.conv(x)


def logger_of(seen: list[Any]) -> Callable[..., None]:
    return lambda *arguments: seen.append(arguments)


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3), NeverTrains()])
def test_functions_are_not_run_where_the_model_runs_without_them(model: nn.Module) -> None:
    seen: list[Any] = []
    model.register_forward_hook(logger_of(seen))
    model.register_forward_pre_hook(seen.append)
    model.register_full_backward_hook(logger_of(seen))
    assert ws.plan(model, example_inputs=X).read_by == "recorded"
    assert not seen


def test_a_function_over_the_model_itself_never_runs_for_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))

    def note(*arguments: Any) -> None:
        model.noted = arguments

    model.register_forward_hook(note)
    recordings, notes = record_both_modes(model, torch.randn(2, 5, 8, 8))
    assert not recordings
    assert len(notes) == 2
    assert "noted" not in vars(model)
