"""The benchmark of a step: what it goes on with, and the memory that it counts."""

import argparse
from typing import Any

import attached
import pytest
import torch
from attached import peak_bytes
from torch import Tensor, nn

import we_surgery as ws


def one_row(name: str, mode: str, micro_batches: int, rounds: int) -> dict[str, Any]:
    spread = {"median": 1.0, "smallest": 1.0, "largest": 1.0}
    row = {"network": name, "mode": mode, "micro_batches": micro_batches, "rounds": rounds}
    return row | {"converted": spread, "attached": spread}


def test_it_goes_on_with_the_rows_that_are_missing(monkeypatch, tmp_path):
    asked = []

    def compare_steps(*row: Any) -> dict[str, Any]:
        asked.append(row[:3])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return one_row(*row)

    monkeypatch.setattr(attached, "compare_steps", compare_steps)
    monkeypatch.setattr(attached, "passes", lambda *_: {"bytes": [1, 1], "nodes": [1, 1]})
    monkeypatch.setattr(attached, "memory", lambda *_: {"held": 1.0, "step": 1.0})
    monkeypatch.setattr(attached, "guards_milliseconds", lambda _: 1.0)
    options = argparse.Namespace(
        networks=["resnet18"], rounds=1, minutes=None, resume=True, output=tmp_path
    )
    with pytest.raises(KeyboardInterrupt):
        attached.run(options)
    attached.run(options)
    rows = [row for row in attached.ROWS if row[0] == "resnet18"]
    assert asked == [rows[0], rows[1], *rows[1:]]
    options.resume = False
    options.minutes = 0
    attached.run(options)
    assert len(asked) == 1 + len(rows)


def layers(count: int) -> nn.Module:
    return nn.Sequential(*[nn.Conv2d(32, 32, 3) for _ in range(count)])


def bytes_of_a_step(count: int) -> int:
    model = layers(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    ws.attach(model, optimizer, "lwe+mwe")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return peak_bytes(optimizer.step)


@pytest.mark.filterwarnings("ignore:.*profiler")
def test_a_step_takes_what_one_layer_takes():
    bytes_of_a_step(1)
    few, many = bytes_of_a_step(4), bytes_of_a_step(12)
    weight = 32 * 32 * 9 * 4
    assert (many - few) / (8 * weight) < 0.15
    assert few < 4 * weight


def saved_and_nodes(model: nn.Module, x: Tensor) -> tuple[list[tuple[int, ...]], int]:
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append((*tensor.shape, tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    return saved, attached.graph_nodes(output)


def test_forward_and_backward_are_those_of_vanilla():
    model, x = layers(3), torch.randn(2, 32, 9, 9)
    vanilla = saved_and_nodes(model, x)
    ws.attach(model, torch.optim.SGD(model.parameters(), 0.1), "lwe+mwe")
    assert saved_and_nodes(model, x) == vanilla
    assert saved_and_nodes(ws.convert(layers(3), "lwe+mwe"), x) != vanilla
