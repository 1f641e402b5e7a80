"""Models that Python's deep copy refuses are converted and stripped all the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws
from we_surgery._util.copies import copy_model


class Remembers(nn.Module):
    """Keeps what it computed last, also deep in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        self.last = [out, {"also": (out * 2,)}]
        return out


class OldWeightNorm(nn.Module):
    """Its normalized weight is a result, kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.normalized = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.normalized(self.conv(x))
        return out


class Uncopied(nn.Module):
    """Holds views of dictionaries, a lock and a Python module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.table = {"a": 1}
        self.names, self.ordered = self.table.keys(), OrderedDict(b=2).items()
        self.more = [self.table.values(), threading.Lock(), threading.RLock(), torch]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", [Remembers, OldWeightNorm, Uncopied])
@pytest.mark.parametrize("inputs", [None, torch.randn(1, 3, 5, 5)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_ran_is_planned_converted_and_stripped(
    kind: type[nn.Module], inputs: Tensor | None, inplace: bool
) -> None:
    model, x = kind(), torch.randn(1, 3, 5, 5)
    model(x)
    plan = ws.plan(model, "lwe", example_inputs=inputs)
    assert plan.read_by == ("symbolic" if inputs is None else "recorded")
    assert [row.module for row in plan.excited] == ["conv"]
    converted = ws.convert(model, plan=plan, example_inputs=inputs, inplace=inplace)
    out = converted(x)
    stripped = ws.strip(converted, example_inputs=inputs)
    torch.testing.assert_close(stripped(x), out)


def test_a_copy_has_results_without_their_graph_and_views_of_its_own() -> None:
    model = Remembers()
    model(torch.randn(1, 3, 5, 5))
    copied = copy_model(model)
    assert isinstance(copied, Remembers)
    assert torch.equal(copied.last[0], model.last[0])
    assert copied.last[0] is not model.last[0]
    assert not copied.last[0].requires_grad
    views = Uncopied()
    again = copy_model(views)
    assert isinstance(again, Uncopied)
    again.table["c"] = 3
    assert list(again.names) == ["a", "c"]
    assert list(views.names) == ["a"]
    assert list(again.ordered) == [("b", 2)]


class Streams(nn.Module):
    """Holds what no copy can have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stream = (n for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def test_each_hint_of_a_model_that_cannot_be_copied_is_true() -> None:
    model, x = Streams(), torch.randn(1, 3, 5, 5)
    with pytest.raises(ws.SurgeryError, match=r"cannot be copied.*\n.*no `example_inputs`"):
        ws.convert(model, "lwe", example_inputs=x)
    with pytest.raises(ws.SurgeryError, match=r"(?s)cannot pickle.*Leave out `example_inputs`"):
        ws.convert(model, "lwe", example_inputs=x, inplace=True)
    converted = ws.convert(model, "lwe", inplace=True)
    out = converted(x)
    assert torch.equal(ws.strip(converted, inplace=True)(x), out)
