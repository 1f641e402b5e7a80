"""How excitation sets in after a pause: with a jump, or without where it can."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws

CONFIGS = Path(__file__).parents[2] / "configs"
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
WITHOUT_IDENTITY = ("thesis-lwe-in-lwe", "thesis-mwe-in-lwe", "thesis-curve", "shift-attention")


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    return nn.Sequential(*convs)


def trained(model: nn.Module, excitation: Any = None) -> nn.Module:
    del excitation  # only kept alive
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    return [model[0].weight.detach().clone(), model[3].weight.detach().clone()]


@pytest.mark.parametrize("config", WITHOUT_IDENTITY)
def test_a_pause_needs_no_start_as_an_identity(
    config: str, caplog: pytest.LogCaptureFixture
) -> None:
    vanilla = trained(net())
    with caplog.at_level(logging.WARNING):
        model = trained(ws.convert(net(), config=CONFIGS / f"{config}.yaml", start="paused"))
    assert "'0' will jump when its excitation starts" in caplog.text
    for found, expected in zip(weights_of(model), weights_of(vanilla), strict=True):
        assert torch.equal(found, expected)
    assert ws.resume(model) == 2
    assert not torch.allclose(weights_of(model)[0], weights_of(vanilla)[0])
    assert not [m for m in model.modules() if type(m).__name__ == "Rescale"]


@pytest.mark.parametrize("config", ["lwe", "weight-norm", "thesis", *WITHOUT_IDENTITY])
def test_the_plain_switch_is_a_conversion_at_that_moment(config: str) -> None:
    path = CONFIGS / f"{config}.yaml"
    torch.manual_seed(1)
    paused = ws.convert(net(), config=path, init="paper", start="paused")
    saved = copy.deepcopy(trained(paused).state_dict())
    ws.resume(paused)
    vanilla = trained(net())
    torch.manual_seed(0)
    net()
    expected = ws.convert(vanilla, config=path)
    for found, other in zip(weights_of(paused), weights_of(expected), strict=True):
        assert torch.equal(found, other)
    resumed = ws.convert(net(), config=path, init="paper", start="paused")
    resumed.load_state_dict(saved)
    assert ws.resume(resumed) == 2
    assert torch.equal(weights_of(resumed)[1], weights_of(paused)[1])


@pytest.mark.parametrize("init", ["paper", None])
def test_the_attached_form_sets_in_as_the_converted_one(init: str | None) -> None:
    options = {"config": CONFIGS / "lwe.yaml", "init": init, "start": "paused"}
    converted = ws.convert(net(), **options)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    excitation = ws.attach(model, optimizer, **options)
    own = torch.optim.SGD(converted.parameters(), 0.05)
    for step in range(4):
        if step == 2:
            before = weights_of(model)
            assert ws.resume(excitation) == ws.resume(converted) == 2
            jumps = not torch.allclose(weights_of(model)[0], before[0], atol=1e-5)
            assert jumps is (init == "paper")
        for each, moved in ((model, optimizer), (converted, own)):
            moved.zero_grad()
            each(X).square().mean().backward()
            moved.step()
        for found, expected in zip(weights_of(model), weights_of(converted), strict=True):
            assert torch.equal(found, expected)


def test_a_pause_that_is_to_end_without_a_jump_is_refused_where_it_cannot() -> None:
    with pytest.raises(ws.InputError, match="cannot be initialized as the identity"):
        ws.convert(net(), config={"lwe": {"inner": "mwe"}}, init="preserve", start="paused")
