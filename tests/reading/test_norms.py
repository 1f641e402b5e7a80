"""Which layers a norm follows, by a recording and by a symbolic trace alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.reading import LayerFacts, read

Path = Callable[["Toy", Tensor], Any]


class NormActivation(nn.Module):
    """A norm and an activation under a name that does not say which norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu()


class Toy(nn.Module):
    """A conv whose result takes the path that a test gives."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.pool, self.largest = nn.AvgPool2d(2), nn.MaxPool2d(2)
        self.drop = nn.Dropout()
        self.first, self.both = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.second, self.over_both = nn.GroupNorm(2, 4), nn.GroupNorm(2, 8)
        self.wrapped = NormActivation(8)
        self.layer_norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.path = path

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


PATHS: dict[str, tuple[Path, bool]] = {
    "norm": (lambda m, x: m.first(m.conv(x)), True),
    "functional norm": (lambda m, x: F.layer_norm(m.conv(x), (8,)), True),
    "dropout, norm": (lambda m, x: m.first(m.drop(m.conv(x))), True),
    "pool, norm": (lambda m, x: m.first(m.pool(m.conv(x))), True),
    "max pool, norm": (lambda m, x: m.first(m.largest(m.conv(x))), True),
    "pad, norm": (lambda m, x: m.first(F.pad(m.conv(x), (1, 1, 1, 1))), True),
    "resized, norm": (lambda m, x: m.first(F.interpolate(m.conv(x), scale_factor=2)), True),
    "permute, norm": (lambda m, x: m.layer_norm(m.conv(x).permute(0, 2, 3, 1)), True),
    "flatten, transpose, norm": (
        lambda m, x: m.layer_norm(torch.flatten(m.conv(x), 2).transpose(1, 2)),
        True,
    ),
    "its shape is read as well": (
        lambda m, x: (lambda y: m.first(y) + y.shape[0] * y.size(1))(m.conv(x)),
        True,
    ),
    "two norms": (lambda m, x: (lambda y: m.first(y) + m.second(y))(m.conv(x)), True),
    "called twice, each with a norm": (
        lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x.relu())),
        True,
    ),
    "relu, norm": (lambda m, x: m.first(m.relu(m.conv(x))), True),
    "functional relu, norm": (lambda m, x: m.first(F.leaky_relu(m.conv(x), 0.1)), True),
    "constant factor, norm": (lambda m, x: m.first(0.5 * m.conv(x)), True),
    "layer scale, norm": (lambda m, x: m.first(m.conv(x) * m.scale), True),
    "two convs, cat, batch norm": (
        lambda m, x: m.both(torch.cat([m.conv(x), m.other(x)], 1)),
        True,
    ),
    "dense: cat with the input, batch norm": (
        lambda m, x: m.both(torch.cat([x, m.conv(x)], 1)),
        True,
    ),
    "cat, batch norm in a module of its own": (
        lambda m, x: m.wrapped(torch.cat([x, m.conv(x)], 1)),
        True,
    ),
    "cat, norm across both": (lambda m, x: m.over_both(torch.cat([x, m.conv(x)], 1)), False),
    "stack, mean, norm": (lambda m, x: m.first(torch.stack([x, m.conv(x)]).mean(0)), False),
    "silu, norm": (lambda m, x: m.first(m.silu(m.conv(x))), False),
    "sigmoid, norm": (lambda m, x: m.first(m.conv(x).sigmoid()), False),
    "sum, norm": (lambda m, x: m.first(m.conv(x) + x), False),
    "sum, norm, as a pre-activation block": (
        lambda m, x: m.other(m.relu(m.first(x + m.conv(m.relu(m.second(x)))))),
        False,
    ),
    "product of two maps, norm": (lambda m, x: m.first(m.conv(x) * x), False),
    "conv, norm": (lambda m, x: m.first(m.other(m.conv(x))), False),
    "output": (lambda m, x: m.conv(x), False),
    "norm beside a shortcut": (lambda m, x: (lambda y: m.first(y) + y)(m.conv(x)), False),
    "called twice, once with a norm": (
        lambda m, x: m.first(m.conv(x)) + m.other(m.conv(x)),
        False,
    ),
    "unused": (lambda m, x: (m.conv(x), x + 1)[1], False),
}


def conv_of(path: Path, read_by: str) -> LayerFacts:
    found = read(Toy(path), torch.randn(2, 4, 8, 8) if read_by == "recorded" else None)
    assert found.read_by == read_by
    return next(facts for facts in found.layers if facts.name == "conv")


@pytest.mark.parametrize("read_by", ["recorded", "symbolic"])
@pytest.mark.parametrize("path", PATHS)
def test_a_norm_counts_where_it_comes_before_anything_that_notices_the_scale(
    path: str, read_by: str
) -> None:
    forward, followed = PATHS[path]
    assert bool(conv_of(forward, read_by).followed_by_norm) is followed


class Mixed(nn.Module):
    """MixNet's convs of several sizes, each on a part of the channels."""

    def __init__(self, pieces: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, size, padding=size // 2) for size in (3, 5))
        self.norm = nn.BatchNorm2d(4)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(part) for conv, part in zip(self.convs, self.pieces(x), strict=True)]
        return self.norm(torch.cat(parts, 1))


@pytest.mark.parametrize("read_by", ["recorded", "symbolic"])
@pytest.mark.parametrize(
    "pieces",
    [
        lambda x: x.split([2, 2], 1),
        lambda x: torch.split(x, dim=1, split_size_or_sections=(2, 2)),
        lambda x: x.chunk(2, 1),
        lambda x: torch.chunk(x, dim=1, chunks=2),
    ],
)
def test_pieces_of_known_number_are_followed(pieces: Callable[[Tensor], Any], read_by: str) -> None:
    found = read(Mixed(pieces), torch.randn(2, 4, 8, 8) if read_by == "recorded" else None)
    assert found.read_by == read_by
    assert found.read_by_reason == ""
    assert [facts.norm_evidence for facts in found.layers] == ["'norm' follows"] * 2


def test_pieces_of_unknown_number_are_not_traced() -> None:
    found = read(Mixed(lambda x: x.split(2, 1)))
    assert "Proxy object cannot be iterated" in found.read_by_reason


def test_the_evidence_names_what_follows() -> None:
    def evidence(path: Path) -> str:
        return conv_of(path, "symbolic").norm_evidence

    assert evidence(lambda m, x: m.first(m.conv(x))) == "'first' follows"
    assert evidence(lambda m, x: m.silu(m.conv(x))) == "'silu'"
    assert evidence(lambda m, x: F.silu(m.conv(x))) == "silu"
    assert evidence(lambda m, x: m.conv(x)) == "the model's output"
    assert evidence(PATHS["cat, norm across both"][0]) == (
        "'over_both', over what several layers return,"
    )
