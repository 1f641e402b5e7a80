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


def gates_of(model: nn.Module) -> dict[str, bool]:
    reading = read(model, torch.randn(2, 3, 6, 6))
    return {layer.name: layer.gate is not None for layer in reading.layers}


@pytest.mark.parametrize("name", GATES)
def test_layers_inside_a_gate_are_marked_and_the_gated_conv_is_not(name: str) -> None:
    found = gates_of(GATES[name]())
    assert not found.pop("stem")
    assert all(found.values())


@pytest.mark.parametrize("name", OTHERS)
def test_products_and_sigmoids_alone_are_no_gate(name: str) -> None:
    assert not any(gates_of(OTHERS[name]()).values())
