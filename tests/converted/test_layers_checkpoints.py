"""State dicts: a vanilla one loads into a converted model; a converted one is never mistaken."""

import copy

import pytest
import torch
from torch import nn
from toys import EVERYTHING, ConvNet, Zoo

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.excitations.names import raw_name


def excitations(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if "excitation." in key}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("model", [ConvNet, Zoo])
def test_a_vanilla_checkpoint_loads_and_becomes_the_raw_weights(
    model: type[nn.Module], assign: bool
) -> None:
    converted, pretrained = ws.convert(model(), config=EVERYTHING), model()
    before = excitations(converted)
    state = pretrained.state_dict()
    keys = list(state)
    converted.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == keys
    for name, layer in excited_layers(converted):
        for parameter in layer.excited_parameters:
            loaded = state[f"{name}.{parameter}"]
            assert torch.equal(getattr(layer, raw_name(parameter)), loaded)
    after = excitations(converted)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.requires_grad for p in converted.parameters())
    converted.eval()
    converted(torch.randn(2, 3 if model is ConvNet else 1, 8, 8)).sum().backward()


def test_a_vanilla_checkpoint_gives_what_converting_the_pretrained_model_gives() -> None:
    pretrained = ConvNet().eval()
    torch.manual_seed(1)
    converted = ws.convert(pretrained)
    torch.manual_seed(1)
    fresh = ws.convert(ConvNet().eval(), plan=ws.plan(pretrained))
    fresh.load_state_dict(copy.deepcopy(converted.state_dict()))
    fresh.load_state_dict(pretrained.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), converted(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_converted_checkpoint_loads_into_a_model_converted_by_the_same_plan(
    assign: bool,
) -> None:
    plan = ws.plan(Zoo(), config=EVERYTHING)
    trained, fresh = ws.convert(Zoo(), plan=plan), ws.convert(Zoo(), plan=plan)
    fresh.load_state_dict(trained.state_dict(), assign=assign)
    state = fresh.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())


def test_a_converted_checkpoint_is_refused_by_a_vanilla_model() -> None:
    state = ws.convert(ConvNet()).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.weight") as error:
        ConvNet().load_state_dict(state)
    assert 'Unexpected key(s) in state_dict: "stem.raw_weight"' in str(error.value)


def test_a_checkpoint_of_another_excitation_is_refused() -> None:
    state = ws.convert(ConvNet(), "lwe").state_dict()
    with pytest.raises(RuntimeError, match=r"has standardize\+lwe\+mwe, the checkpoint"):
        ws.convert(ConvNet(), "lwe+mwe").load_state_dict(state)


def test_a_vanilla_checkpoint_of_another_shape_is_refused() -> None:
    state = ConvNet().state_dict()
    state["stem.weight"] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.weight"):
        ws.convert(ConvNet()).load_state_dict(state)


def test_a_missing_weight_is_reported_as_missing() -> None:
    state = ConvNet().state_dict()
    del state["stem.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.raw_weight"):
        ws.convert(ConvNet()).load_state_dict(state)


def test_a_stray_weight_beside_a_raw_one_is_reported() -> None:
    converted = ws.convert(ConvNet())
    state = converted.state_dict()
    state["stem.weight"] = torch.zeros(8, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"stem\.weight"'):
        converted.load_state_dict(state)


def test_a_vanilla_checkpoint_loads_where_a_layer_is_shared_or_tied() -> None:
    layer = nn.Linear(4, 4)
    vanilla = nn.Sequential(layer, nn.Linear(4, 4), layer)
    vanilla[1].weight = layer.weight
    converted = ws.convert(vanilla, config=EVERYTHING)
    wanted = {key: torch.randn_like(value) for key, value in vanilla.state_dict().items()}
    wanted["1.weight"] = wanted["2.weight"] = wanted["0.weight"]
    wanted["2.bias"] = wanted["0.bias"]
    converted.load_state_dict(wanted)
    assert torch.equal(converted[1].raw_weight, wanted["0.weight"])
    assert converted[1].raw_weight is converted[0].raw_weight


def test_strip_gives_a_state_dict_that_loads_into_the_vanilla_model() -> None:
    converted = ws.convert(Zoo(), config=EVERYTHING).eval()
    vanilla = Zoo().eval()
    vanilla.load_state_dict(ws.strip(converted).state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(vanilla(x), converted(x))


class Renaming(nn.Linear):
    """A layer whose files are of before its weight got its name."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel")


def test_a_vanilla_checkpoint_passes_the_hooks_of_a_layer_first() -> None:
    vanilla = nn.Sequential(Renaming())
    old = {"0.kernel": torch.randn(6, 6), "0.bias": torch.randn(6)}
    vanilla.load_state_dict(old)
    model = ws.convert(nn.Sequential(Renaming()), config={"linear": "lwe"})
    hooks = list(model[0]._load_state_dict_pre_hooks)
    for _ in range(2):
        model.load_state_dict(old)
        assert torch.equal(model[0].raw_weight, vanilla[0].weight)
    assert list(model[0]._load_state_dict_pre_hooks) == hooks
    model.load_state_dict(copy.deepcopy(model.state_dict()))
