"""A cached prefix is used only where it gives what the whole model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from analysis_data import Residual, batches
from torch import Tensor, nn

from we_surgery.analysis.importance import measure_locations
from we_surgery.analysis.prefix import Prefix


def prefix_of(model: nn.Module, layer: str) -> tuple[Prefix, Callable[[], Tensor]]:
    model.eval()
    x = batches(1)[0][0]

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return Prefix.recorded(model, [model.get_submodule(layer)], run), run


def test_a_prefix_holds_the_largest_modules_that_ended_before() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 5, 1))
    prefix, _ = prefix_of(model, "1")
    assert prefix.calls == [model[0]]


@pytest.mark.parametrize("layer", ["first", "second", "branch", "last.0", "head"])
def test_what_lies_before_the_layer_is_not_run_again(layer: str) -> None:
    model = Residual()
    prefix, run = prefix_of(model, layer)
    ran: list[str] = []
    for name, module in model.named_children():
        forward = module.forward

        def noted(*args: Tensor, name: str = name, forward: Callable = forward) -> Tensor:
            ran.append(name)
            return forward(*args)

        module.__dict__["forward"] = noted
    with torch.no_grad():
        model.get_submodule(layer).weight.flatten()[0] = 0
    whole = run()
    order = list(ran)
    ran.clear()
    assert prefix.agrees(run, whole)
    ran.clear()
    assert torch.equal(prefix.run(run), whole)
    top = layer.partition(".")[0]
    assert ran == order[order.index(top) :]


def test_outputs_that_nothing_reads_are_let_go() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)])
    prefix, run = prefix_of(model, "4")
    assert prefix.agrees(run, run())
    assert [bool(output.isnan().any()) for output in prefix._outputs] == [True] * 3 + [False]


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3)
        self.noise = Noise()
        self.two = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.noise(self.one(x))).mean((2, 3)) + torch.rand(1)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class ReadByParent(nn.Module):
    """The second conv's weight is read before the conv is called."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3)
        self.two = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x + self.two.weight.sum())
        return self.two(x).mean((2, 3))


@pytest.mark.parametrize("kind", [Random, ReadByParent])
def test_a_model_that_a_prefix_does_not_fit_is_evaluated_whole(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    other = copy.deepcopy(model)
    arguments = {
        "metric": batches(1),
        "samples": (3, 3),
        "layers": ("two",),
        "score": "log_likelihood",
    }
    shared, _ = measure_locations(model, **arguments)
    whole, _ = measure_locations(other, **arguments, share_prefixes=False)
    assert shared.shared == 0
    assert shared.values == whole.values


def test_a_tied_weight_counts_from_its_first_owner() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(3)], nn.Flatten())
    model[2].weight = model[0].weight
    arguments = {
        "metric": batches(1),
        "samples": (2, 2),
        "layers": ("*",),
        "score": "log_likelihood",
    }
    shared, _ = measure_locations(model, **arguments)
    whole, _ = measure_locations(model, **arguments, share_prefixes=False)
    assert shared.values == whole.values
