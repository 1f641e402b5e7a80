"""Vanilla weights into a converted model: by their vanilla names, as many as fit."""

import copy
import warnings

import pytest
import torch
from torch import nn
from toys import ConvNet

import we_surgery as ws


def net(classes: int = 5) -> nn.Sequential:
    conv = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


@pytest.fixture
def vanilla() -> nn.Sequential:
    torch.manual_seed(1)
    return net().eval()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["lwe", "mwe", "lwe+mwe"])
def test_the_model_then_computes_what_the_checkpoint_did(vanilla, mode):
    model = ws.convert(net(), mode).eval()
    found = ws.load_vanilla(model, {"model": vanilla.state_dict(), "epoch": 3})
    torch.testing.assert_close(model(IMAGES), vanilla(IMAGES), rtol=1e-5, atol=1e-5)
    assert sorted(found.loaded_keys) == sorted(vanilla.state_dict())
    assert (found.missing_keys, found.unexpected_keys, found.mismatched_keys) == ([], [], [])
    stripped = ws.strip(model)
    torch.testing.assert_close(stripped[0].weight, vanilla[0].weight, rtol=1e-4, atol=1e-5)


def test_the_paper_start_is_that_of_load_state_dict(vanilla):
    model = ws.convert(net(), "lwe")
    other = copy.deepcopy(model)
    ws.load_vanilla(model, vanilla.state_dict(), init="paper")
    other.load_state_dict(vanilla.state_dict())
    assert torch.equal(model[0].raw_weight, vanilla[0].weight)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_does_not_fit_is_named_and_left_alone(vanilla):
    model = ws.convert(net(classes=3), "lwe")
    head = {name: value.clone() for name, value in model[4].state_dict().items()}
    state = {f"module.{name}": value for name, value in vanilla.state_dict().items()}
    del state["module.1.weight"]
    found = ws.load_vanilla(model, state | {"module.9.weight": torch.ones(2)})
    assert found.mismatched_keys == ["4.weight", "4.bias"]
    assert (found.missing_keys, found.unexpected_keys) == (["1.weight"], ["9.weight"])
    assert found[:2] == (found.missing_keys, found.unexpected_keys)
    assert "0.weight" in found.loaded_keys
    for name, value in head.items():
        assert torch.equal(model[4].state_dict()[name], value), name


def test_a_paused_excitation_stays_so(vanilla):
    model = ws.convert(net(), "lwe", start="paused").eval()
    ws.load_vanilla(model, vanilla.state_dict())
    assert torch.equal(model[0].raw_weight, vanilla[0].weight)
    assert torch.equal(model(IMAGES), vanilla(IMAGES))
    ws.resume(model)
    torch.testing.assert_close(model(IMAGES), vanilla(IMAGES), rtol=1e-5, atol=1e-5)


def test_weights_held_for_a_graph_are_found(vanilla):
    graph = torch.fx.symbolic_trace(net())
    model = ws.convert(graph, "lwe").eval()
    ws.load_vanilla(model, vanilla.state_dict())
    torch.testing.assert_close(model(IMAGES), vanilla(IMAGES), rtol=1e-5, atol=1e-5)


def unable() -> nn.Module:
    return ws.convert(net(), config={"linear": "mwe", "mwe": {"curve": "tanh"}})


@pytest.mark.parametrize(
    ("model", "state", "said"),
    [
        (net, lambda: net().state_dict(), "is not converted"),
        (lambda: ws.convert(net()), lambda: ws.convert(net()).state_dict(), "of a converted model"),
        (
            lambda: ws.convert(net()),
            lambda: ConvNet().state_dict(),
            "none of the model",
        ),
        (unable, lambda: net().state_dict(), "cannot be initialized as the identity"),
    ],
)
def test_an_error_changes_nothing(model, state, said):
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ws.InputError, match=said):
        ws.load_vanilla(model, state())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_keys_that_both_have_in_common_leave_out_the_weight_with_a_warning(vanilla):
    model = ws.convert(net(), "lwe")
    state = vanilla.state_dict()
    common = {name: value for name, value in state.items() if name in model.state_dict()}
    with pytest.warns(ws.PartialLoadWarning, match=r"'4\.bias', but neither '4\.weight'"):
        model.load_state_dict(common, strict=False)


@pytest.mark.parametrize("names", [(), ("0.", "1."), ("0.", "1.", "4.")])
def test_no_warning_where_no_weight_is_left_out(vanilla, names):
    model = ws.convert(net(), "lwe")
    for state in (vanilla.state_dict(), model.state_dict()):
        part = {name: value for name, value in state.items() if name.startswith(names)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(part, strict=False)
