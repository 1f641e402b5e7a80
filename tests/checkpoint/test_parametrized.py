"""Our excitations registered by torch.nn.utils.parametrize: state dicts fold to vanilla ones."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from toys import ConvNet

import we_surgery as ws
from we_surgery.checkpoint import strip_state_dict_with_report
from we_surgery.checkpoint.unwrap import VERSIONS
from we_surgery.errors import InputError
from we_surgery.excitations import LWE, MWE, Standardize, WeightLayout, build_excitation


def composition(layer, *stages):
    layout = WeightLayout(tuple(layer.weight.shape), getattr(layer, "groups", 1))
    return build_excitation([{stage: {}} for stage in stages], layout)


def register(layer, *excitations):
    for excitation in excitations:
        parametrize.register_parametrization(layer, "weight", excitation)


def parametrized_net():
    torch.manual_seed(0)
    model = ConvNet()
    register(model.stem, Standardize(), LWE(3), MWE())
    register(model.depthwise, LWE(8, 8))
    register(model.grouped, composition(model.grouped, "standardize", "lwe"))
    register(model.head, MWE(detach_max=False))
    return model.eval()


def test_it_folds_to_a_vanilla_file_in_the_vanilla_order():
    model = parametrized_net()
    state, report = strip_state_dict_with_report({"model": model.state_dict(), "epoch": 3})
    vanilla = ConvNet().eval()
    assert list(state) == list(vanilla.state_dict())
    assert getattr(state, VERSIONS) == getattr(vanilla.state_dict(), VERSIONS)
    assert report.layers == 4
    assert (
        "parametrize: stem.weight, depthwise.weight, grouped.weight, head.weight"
        in (report.notes[-1])
    )
    vanilla.load_state_dict(state, strict=True)
    for name in ("depthwise", "grouped", "head"):
        assert torch.equal(getattr(vanilla, name).weight, getattr(model, name).weight), name
    # Stages that are registered one by one round between them.
    torch.testing.assert_close(vanilla.stem.weight, model.stem.weight.data)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(vanilla(x), model(x))


def test_a_weight_of_the_model_itself():
    layer = nn.Linear(4, 3)
    register(layer, composition(layer, "mwe"))
    state = ws.strip_state_dict(layer.state_dict())
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], layer.weight)


def test_other_parametrizations_are_left_alone():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    register(model[2], nn.Tanh())
    with pytest.warns(ws.NothingToStripWarning):
        assert list(ws.strip_state_dict(model.state_dict())) == list(model.state_dict())


@pytest.mark.parametrize("excitation", [Standardize(0.1), MWE(0.2), LWE(3)], ids=repr)
def test_a_stage_by_itself_is_known_by_its_record(excitation):
    layer = nn.Linear(3, 3)
    register(layer, excitation)
    state = ws.strip_state_dict({"fc." + k: v for k, v in layer.state_dict().items()})
    assert list(state) == ["fc.weight", "fc.bias"]
    # A composition of one stage rounds otherwise than the stage.
    torch.testing.assert_close(state["fc.weight"], layer.weight.detach())


@pytest.mark.parametrize("as_composition", [True, False])
def test_excitations_without_their_records_are_refused(as_composition):
    layer = nn.Linear(3, 3)
    register(layer, composition(layer, "lwe") if as_composition else LWE(3))
    with pytest.raises(InputError, match=r"nothing says how .*weight.original"):
        ws.strip_state_dict({name: value.detach() for name, value in layer.named_parameters()})


def test_an_order_that_is_none_of_ours_is_refused():
    for chain in ((LWE(3), Standardize(), MWE()), (nn.Tanh(), LWE(3)), (LWE(3), LWE(3))):
        layer = nn.Linear(3, 3)
        register(layer, *chain)
        with pytest.raises(InputError, match="not a composition of ours"):
            ws.strip_state_dict(layer.state_dict())
