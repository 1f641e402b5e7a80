"""Layers whose class writes its own state dict, as PyTorch Geometric's Linear does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import we_surgery as ws


class OwnState(nn.Linear):
    """Saves what it calls its weight and its bias by hand."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


def converted() -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(nn.Sequential(OwnState(4, 6), nn.Linear(6, 2)), "mwe")


def trained() -> nn.Module:
    model = converted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def test_the_raw_weight_is_saved_and_comes_back() -> None:
    model = trained()
    state = model.state_dict()
    assert torch.equal(state["0.raw_weight"], model[0].raw_weight)
    assert "0.weight" not in state
    again = converted()
    again.load_state_dict(state)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(state)


def test_its_place_and_its_parameter_are_kept() -> None:
    model = trained()
    vanilla = nn.Sequential(OwnState(4, 6), nn.Linear(6, 2))
    names = [key.replace("raw_weight", "weight") for key in model.state_dict()]
    assert [key for key in names if "excitation" not in key] == list(vanilla.state_dict())
    assert model.state_dict(keep_vars=True)["0.raw_weight"] is model[0].raw_weight


def test_a_state_dict_folds_to_what_strip_gives() -> None:
    model = trained()
    folded: dict[str, Tensor] = ws.strip_state_dict(model.state_dict())
    stripped = ws.strip(model).state_dict()
    assert list(folded) == list(stripped)
    assert all(torch.equal(folded[key], value) for key, value in stripped.items())
