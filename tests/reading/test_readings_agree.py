"""A recording and a trace of one model tell the same about each of its weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.reading import LayerFacts, read


class Everything(nn.Module):
    """A weight for each fact, in modules and bare."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.squeeze = nn.Parameter(torch.randn(2, 8, 1, 1))
        self.expand = nn.Conv2d(2, 8, 1)
        self.by_parent = nn.Linear(8, 8)
        self.written = nn.Linear(8, 8)
        self.on_table = nn.Linear(2, 8)
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.scaled = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.ones(8, 1))
        self.penalized = nn.Parameter(torch.randn(8, 8))
        self.twice = nn.Parameter(torch.randn(8, 4, 1, 1))
        self.register_buffer("table", torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        shifted = torch.cat([torch.roll(x[:, :4], 1, 3), x[:, 4:]], 1)
        x = F.conv2d(shifted, self.kernel)
        hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), self.squeeze))
        x = x * self.expand(hidden).sigmoid()
        x = F.conv2d(x, self.twice, groups=2).mean((2, 3))
        x = x + F.conv2d(x[:, :4, None, None], self.twice).mean((1, 2, 3)).unsqueeze(1)
        x = F.linear(x, self.by_parent.weight, self.by_parent.bias)
        self.written.weight.data.mul_(0.5)
        x = self.written(x) + self.on_table(self.table).mean(0)
        x = F.linear(x @ self.turned, self.scaled * self.scale)
        return F.linear(x, self.penalized) + self.penalized.square().sum()


def told(layer: LayerFacts) -> dict[str, Any]:
    names = "kind layout gate constant_input readers no_gradient followed_by_norm".split()
    facts = {name: getattr(layer, name) for name in names}
    # What an operation or a node is called depends on the graph.
    obstacles = [layer.obstacle_for("converted"), layer.obstacle_for("attached")]
    facts["obstacles"] = [None if why is None else why.split(" by ")[0] for why in obstacles]
    facts["shift"] = layer.shift
    return facts


def test_a_trace_and_a_recording_tell_the_same() -> None:
    recorded, traced = read(Everything(), torch.randn(2, 3, 6, 6)), read(Everything())
    assert (recorded.read_by, traced.read_by) == ("recorded", "symbolic")
    assert [layer.name for layer in recorded.layers] == [layer.name for layer in traced.layers]
    for one, other in zip(recorded.layers, traced.layers, strict=True):
        assert told(one) == told(other), one.name
    found = {layer.name: layer for layer in traced.layers}
    assert found["stem"].followed_by_norm
    assert found["on_table"].constant_input
    assert found["by_parent"].readers == ("",)
    assert found["kernel"].shift
    assert found["squeeze"].gate
    assert found["expand"].gate
    assert found["turned"].obstacle is None
    refused = ["twice", "written", "scaled", "penalized"]
    assert all(found[name].obstacle is not None for name in refused)


def test_a_product_that_is_traced_is_excited_in_the_optimizers_step() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.weight

    model = Turned()
    excitation = ws.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "mwe")
    assert [row.kind for row in excitation.plan.excited] == ["linear_transpose", "linear"]
