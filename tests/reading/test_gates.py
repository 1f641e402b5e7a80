"""Attention gates are found by what the data does, whatever their classes are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.reading import read


class Unit(nn.Module):
    """A conv, then a block built around ``inner`` convs and a function of them and the map."""

    def __init__(self, block: Callable[..., Tensor], *inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.ModuleList(inner)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x), *self.inner)


def pointwise(channels: int = 8) -> nn.Module:
    return nn.Conv2d(8, channels, 1)


def squeeze(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def channel_statistics(x: Tensor) -> Tensor:
    return torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)


def two_gates(x: Tensor, rows: nn.Module, columns: nn.Module) -> Tensor:
    vertical = rows(x.mean(3, keepdim=True)).sigmoid()
    horizontal = columns(x.mean(2, keepdim=True)).sigmoid()
    return x * vertical * horizontal


def modules_and_sizes(x: Tensor, pool: nn.Module, fc: nn.Module, act: nn.Module) -> Tensor:
    b, c, _, _ = x.size()
    return x * act(fc(pool(x).view(b, c))).view(b, c, 1, 1).expand_as(x)


def split_attention(x: Tensor, widen: nn.Module, fc: nn.Module) -> Tensor:
    b, c, h, w = x.shape
    parts = widen(x).reshape(b, 2, c, h, w)
    scores = fc(squeeze(parts.sum(1))).view(b, 2, c, 1, 1)
    return (parts * torch.softmax(scores, 1)).sum(1)


GATES: dict[str, Callable[[], Unit]] = {
    "squeeze and excitation": lambda: Unit(
        lambda x, a, b: x * b(a(squeeze(x)).relu()).sigmoid(), pointwise(), pointwise()
    ),
    "hard sigmoid by hand": lambda: Unit(
        lambda x, a: x * (F.relu6(a(squeeze(x)) + 3) / 6), pointwise()
    ),
    "spatial": lambda: Unit(
        lambda x, a: x * a(channel_statistics(x)).sigmoid(), nn.Conv2d(2, 1, 7, padding=3)
    ),
    "residual, as in BAM": lambda: Unit(
        lambda x, a: x * (1 + a(squeeze(x)).sigmoid()), pointwise()
    ),
    "coordinate": lambda: Unit(two_gates, pointwise(), pointwise()),
    "product of two activations": lambda: Unit(
        lambda x, a, b: x * (a(x.mean(3, keepdim=True)).sigmoid() * b(squeeze(x)).sigmoid()),
        *(pointwise(), pointwise()),
    ),
    "sum of two activations": lambda: Unit(
        lambda x, a, b: x * (a(squeeze(x)).sigmoid() + b(x.amax((2, 3), True)).sigmoid()),
        *(pointwise(), pointwise()),
    ),
    "modules, views of its size": lambda: Unit(
        modules_and_sizes, nn.AdaptiveAvgPool2d(1), nn.Linear(8, 8), nn.Hardsigmoid()
    ),
    "split attention": lambda: Unit(split_attention, pointwise(16), pointwise(16)),
    "over channels of a linear": lambda: Unit(
        lambda x, a: x * a(x.mean((2, 3))).sigmoid()[:, :, None, None], nn.Linear(8, 8)
    ),
}


def recurrent_cell(x: Tensor, update: nn.Module, candidate: nn.Module) -> Tensor:
    state, given = x[:, :4].tanh(), x[:, 4:].relu()
    both = torch.cat([state, given], 1)
    keep = update(both).sigmoid()
    return (1 - keep) * state + keep * candidate(both).tanh()


def gated_by_two_sources(x: Tensor, side: nn.Module, mix: nn.Module) -> Tensor:
    given = side(x)
    state = x.relu()
    return state * mix(torch.cat([state, given], 1)).sigmoid()


OTHERS: dict[str, Callable[[], Unit]] = {
    "swish": lambda: Unit(lambda x, a: (y := a(x)) * y.sigmoid(), pointwise()),
    "gated linear unit": lambda: Unit(lambda x, a: F.glu(a(x), 1), pointwise(16)),
    "two-branch gated unit": lambda: Unit(
        lambda x, a, b: a(x) * b(x).sigmoid(), pointwise(), pointwise()
    ),
    "pooled branch": lambda: Unit(lambda x, a: x + a(squeeze(x)), pointwise()),
    "large-kernel product": lambda: Unit(lambda x, a: x * a(x), pointwise()),
    "update gate of a recurrent cell": lambda: Unit(recurrent_cell, pointwise(4), pointwise(4)),
    "gate that also sees another map": lambda: Unit(
        gated_by_two_sources, pointwise(), nn.Conv2d(16, 8, 1)
    ),
    "sigmoid output": lambda: Unit(lambda x, a: a(x).sigmoid(), pointwise()),
}


def gates_of(model: nn.Module, read_by: str) -> set[str]:
    reading = read(model, torch.randn(2, 3, 6, 6) if read_by == "recorded" else None)
    assert reading.read_by == read_by
    return {layer.name for layer in reading.layers if layer.gate is not None}


both_readings = pytest.mark.parametrize("read_by", ["recorded", "symbolic"])


@both_readings
@pytest.mark.parametrize("name", GATES)
def test_layers_inside_a_gate_are_marked_and_the_gated_conv_is_not(name: str, read_by: str) -> None:
    model = GATES[name]()
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    outside = {"stem"} | ({"inner.0"} if name == "split attention" else set())
    assert gates_of(model, read_by) == layers - outside


@both_readings
@pytest.mark.parametrize("name", OTHERS)
def test_products_and_sigmoids_alone_are_no_gate(name: str, read_by: str) -> None:
    assert not gates_of(OTHERS[name](), read_by)


@both_readings
def test_what_the_main_network_uses_as_well_is_not_in_the_gate(read_by: str) -> None:
    def block(x: Tensor, deeper: nn.Module, score: nn.Module) -> Tensor:
        y = deeper(x).relu()
        return torch.cat([x * score(y).sigmoid(), y], 1)

    assert gates_of(Unit(block, pointwise(), pointwise()), read_by) == {"inner.1"}


def test_weights_that_a_graph_reads_itself_are_found_in_gates() -> None:
    model = GATES["squeeze and excitation"]()
    exported = torch.export.export(model, (torch.randn(2, 3, 6, 6),)).module()
    rows = {layer.path: layer.gate is not None for layer in read(exported).layers}
    assert rows == {"stem.weight": False, "inner.0.weight": True, "inner.1.weight": True}


def test_a_part_that_cannot_be_traced_is_in_the_gate_around_it() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = pointwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    block = GATES["squeeze and excitation"]().block
    assert gates_of(Unit(block, Branching(), pointwise()), "symbolic") == {
        *("inner.0.conv", "inner.1"),
    }
