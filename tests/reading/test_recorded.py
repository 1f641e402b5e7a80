"""A recording costs what the model's own operations cost, and leaves nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import we_surgery as ws
from we_surgery.reading.recorded import EXCITATION, Fakes, record


def test_an_excitation_is_one_operation_and_its_result_is_still_computed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    converted = ws.convert(model, "lwe+mwe")
    recording = record(converted, torch.randn(2, 3, 8, 8), fakes=Fakes())
    (node,) = (node for node in recording.graph.nodes if node.meta.get(EXCITATION))
    assert node.op == "call_function"
    assert recording.calls["0.excitation"] == 1
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.eval()(x), converted.eval()(x))


def test_both_recordings_share_their_fake_tensors() -> None:
    model, x, fakes = nn.Linear(3, 2), torch.randn(4, 3), Fakes()
    assert fakes(model.weight) is fakes(model.weight)
    for training in (False, True):
        record(model, x, training=training, fakes=fakes)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was_also_after_a_failure(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        record(nn.Linear(3, 2), torch.randn(1, 3), fakes=Fakes())
        assert gc.isenabled() == enabled
        with pytest.raises(RuntimeError):
            record(nn.Linear(3, 2), torch.randn(1, 4), fakes=Fakes())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
