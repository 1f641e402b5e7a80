"""Bare weights that a module's own forward feeds to a conv or linear, without example inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import we_surgery as ws


class Bare(nn.Module):
    """A conv and a projection without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.projection = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.weight, padding=1)).mean((2, 3))
        return x @ self.projection.t()


class Beside(nn.Module):
    """A module torch.fx can trace beside one that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = Bare()
        self.branching = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.branching(self.bare(x))


class Branching(nn.Module):
    """A forward that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def rows(model: nn.Module, mode: str = "lwe+mwe") -> dict[str, tuple[str, str]]:
    plan = ws.plan(model, mode)
    assert plan.read_by == "symbolic"
    return {f"{d.module}.{d.parameter}": (d.kind, d.verdict) for d in plan.decisions}


def test_bare_weights_are_converted_where_the_whole_model_is_traced() -> None:
    model, x = Bare().eval(), torch.randn(2, 3, 8, 8)
    assert rows(model) == {
        ".weight": ("conv2d", "LWE+MWE (standardized)"),
        ".projection": ("linear", "MWE"),
    }
    converted = ws.convert(model, "lwe+mwe")
    with torch.no_grad():
        assert not torch.allclose(converted(x), model(x))
    converted(x).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    stripped = ws.strip(converted, example_inputs=x)
    assert list(stripped.state_dict()) == list(model.state_dict())
    assert type(stripped) is Bare


def test_a_model_without_any_module_inside_is_traced() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    assert rows(Alone()) == {".weight": ("linear", "MWE")}


def test_they_are_the_same_that_a_recording_finds() -> None:
    model = Bare()
    recorded = ws.plan(model, "lwe+mwe", example_inputs=torch.randn(2, 3, 8, 8))
    traced = ws.plan(model, "lwe+mwe")
    assert [(d.layer, d.excitation) for d in traced.decisions] == [
        (d.layer, d.excitation) for d in recorded.decisions
    ]


def test_they_are_listed_and_left_alone_where_torch_fx_has_not_seen_all() -> None:
    found = {d.layer: d for d in ws.plan(Beside(), "lwe+mwe").decisions}
    for name in ("bare.weight", "bare.projection"):
        row = next(d for d in found.values() if f"{d.module}.{d.parameter}" == name)
        assert row.verdict == "skip"
        assert "torch.fx could not fully trace; give example inputs" in row.reason
    assert found["branching.linear"].verdict == "MWE"


def test_a_weight_that_something_else_reads_too_is_left_alone() -> None:
    class Penalized(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.square().sum()

    model = Penalized()
    assert rows(model)[".weight"] == ("conv2d", "skip")
    assert "is also read by" in next(
        d.reason for d in ws.plan(model).decisions if d.parameter == "weight"
    )


def test_a_buffer_is_no_weight() -> None:
    class Fixed(Bare):
        def __init__(self) -> None:
            super().__init__()
            del self.weight
            self.register_buffer("weight", torch.randn(8, 3, 3, 3))

    assert list(rows(Fixed())) == [".projection"]


class TiedByHand(nn.Module):
    """Reads its embedding's weight as that of a projection, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, **options)
        self.linear = nn.Linear(4, 4)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.linear(self.embedding(words)), self.embedding.weight)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"sparse": True}], ids=str)
def test_an_embedding_that_is_read_as_a_projection_too_is_left_alone(
    options: dict[str, Any],
) -> None:
    words = torch.randint(0, 10, (2, 3))
    for model in (TiedByHand(**options), fx.symbolic_trace(TiedByHand(**options))):
        for inputs in (None, words):
            plan = ws.plan(model, "mwe", example_inputs=inputs)
            assert [row.layer for row in plan.excited] == ["linear"]
