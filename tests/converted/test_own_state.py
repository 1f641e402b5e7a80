"""Layers whose class writes and reads its part of a state dict itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws


class OwnLinear(nn.Module):
    """As PyTorch Geometric's ``Linear``: it saves ``self.weight``, whatever that is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class Packing(OwnLinear):
    """It saves its weight and its bias as one tensor."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "packed"] = torch.cat([self.weight, self.bias.unsqueeze(1)], 1)


class OldNames(OwnLinear):
    """It reads files of before its weight got its name."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def make(kind: type[nn.Module] = OwnLinear) -> nn.Module:
    return nn.Sequential(kind(6, 8), nn.ReLU(), kind(8, 4))


def converted(kind: type[nn.Module] = OwnLinear) -> nn.Module:
    return ws.convert(make(kind), config={"linear": "lwe+mwe"}, example_inputs=torch.randn(2, 6))


def test_the_raw_weights_are_saved_and_strip_to_what_was_trained() -> None:
    model = converted()
    state = model.state_dict()
    assert torch.equal(state["0.raw_weight"], model[0].raw_weight)
    assert "0.weight" not in state
    expected = ws.strip(model).state_dict()
    stripped = ws.strip_state_dict(state)
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], value) for key, value in expected.items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [OwnLinear, OldNames])
def test_a_checkpoint_loads_into_a_model(kind: type[nn.Module], assign: bool) -> None:
    trained, model = converted(kind), converted(kind)
    assert model.load_state_dict(trained.state_dict(), assign=assign) == ([], [])
    x = torch.randn(3, 6)
    assert torch.equal(model(x), trained(x))
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("old", [False, True])
def test_a_vanilla_checkpoint_gives_the_raw_weights(old: bool) -> None:
    vanilla, model = make(OldNames), converted(OldNames)
    state = vanilla.state_dict()
    if old:
        state = {key.replace("weight", "kernel"): value for key, value in state.items()}
    assert model.load_state_dict(state) == ([], [])
    assert torch.equal(model[0].raw_weight, vanilla[0].weight)


def test_what_is_missing_is_named_as_it_should_be() -> None:
    model = converted()
    state = dict(model.state_dict())
    del state["0.raw_weight"]
    missing = pytest.raises(RuntimeError, match=r"Missing key.*0\.raw_weight")
    with pytest.warns(ws.PartialLoadWarning, match="the layer keeps its weight"), missing:
        model.load_state_dict(state)


def test_a_class_that_packs_its_weights_is_refused_by_name() -> None:
    model = make(Packing)
    with pytest.raises(ws.SurgeryError, match=r"layer '0' \(Packing\) would not save"):
        ws.convert(model, "mwe", example_inputs=torch.randn(2, 6), inplace=True)
    assert type(model[0]) is Packing
    assert list(model[0]._parameters) == ["weight", "bias"]


def test_places_and_parameters_are_kept() -> None:
    vanilla, model = make(), converted()
    names = [key.replace("raw_weight", "weight") for key in model.state_dict()]
    assert [key for key in names if "excitation" not in key] == list(vanilla.state_dict())
    assert model.state_dict(keep_vars=True)["0.raw_weight"] is model[0].raw_weight


class OwnParent(nn.Module):
    """A model that makes its own state dict, of whatever its layer's weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def state_dict(self):
        return {"w": self.layer.weight.detach()}


def adding(model: nn.Module, state, prefix, metadata) -> None:
    state[prefix + "layer.weight"] = model.layer.weight.detach()


def renaming(model: nn.Module, state, prefix, metadata) -> None:
    state[prefix + "layer.kernel"] = state.pop(prefix + "layer.weight")


class Hooked(OwnParent):
    """A model whose hook edits its state dict."""

    state_dict = nn.Module.state_dict

    def __init__(self, hook) -> None:
        super().__init__()
        self.register_state_dict_post_hook(hook)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OwnParent(), "layer 'layer' .Linear. would not save its raw weight"),
        (Hooked(adding), "layer 'layer' .Linear. would not save its raw weight"),
        (Hooked(renaming), "own code for its state dict fails .* KeyError: 'layer.weight'"),
    ],
    ids=["its own", "a hook that adds", "a hook that renames"],
)
def test_a_parent_that_saves_an_excited_weight_is_refused_by_name(model, message) -> None:
    with pytest.raises(ws.SurgeryError, match=message):
        ws.convert(model, "mwe", inplace=True)
    assert type(model.layer) is nn.Linear
