"""The excited layer: what is where, what it answers, what it refuses."""

import copy
import importlib
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery._util.transaction import AllOrNothing
from we_surgery.converted import WEConv2d, WELinear
from we_surgery.converted.excite import excite_owner, restore_owner
from we_surgery.converted.layer import ExcitedLayer, excited_class
from we_surgery.excitations import WeightLayout, build_excitation
from we_surgery.excitations.names import excitation_name, raw_name


def excited_conv(*stages: str, bias: bool = True) -> ExcitedLayer:
    conv = nn.Conv2d(8, 6, 3, bias=bias)
    composed = [{stage: {}} for stage in stages]
    excite_owner(
        conv, "weight", build_excitation(composed, WeightLayout(conv.weight.shape)), "block.conv"
    )
    assert isinstance(conv, ExcitedLayer)
    return conv


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(8, 6, 3),
    "Conv2d": lambda: nn.Conv2d(8, 6, 3, groups=2, padding="same", padding_mode="circular"),
    "Conv3d": lambda: nn.Conv3d(8, 6, 3, bias=False),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(8, 6, 3, output_padding=0),
    "Linear": lambda: nn.Linear(8, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_becomes_an_importable_subclass_and_computes_with_the_excited_weight(
    name: str,
) -> None:
    vanilla = LAYERS[name]()
    layer = ws.convert(vanilla, config=EVERYTHING)
    cls = type(layer)
    assert cls.__name__ == f"WE{name}"
    assert getattr(importlib.import_module("we_surgery.converted"), cls.__name__) is cls
    assert isinstance(layer, type(vanilla))
    rank = int(name[-2]) if name[-1] == "d" else 0
    x = torch.randn(2, 8, *[7] * rank)
    by_hand = copy.deepcopy(vanilla)
    by_hand.weight.data = layer.excitation(vanilla.weight.detach())
    assert torch.equal(layer(x), by_hand(x))
    assert not torch.equal(layer(x), vanilla(x))


def test_the_raw_weight_is_the_very_parameter_at_the_very_place() -> None:
    conv = nn.Conv2d(8, 6, 3)
    weight, bias = conv.weight, conv.bias
    excitation = build_excitation([{"mwe": {}}], WeightLayout(conv.weight.shape))
    excite_owner(conv, "weight", excitation, "conv")
    assert list(conv._parameters) == ["raw_weight", "bias"]
    assert conv.raw_weight is weight
    assert conv.bias is bias
    assert conv.excitation is excitation
    restore_owner(conv)
    assert list(conv._parameters) == ["weight", "bias"]
    assert conv.weight is weight
    assert type(conv) is nn.Conv2d


def test_converting_and_restoring_leaves_no_trace_in_the_layer() -> None:
    conv = nn.Conv2d(8, 6, 3)
    before = {name: value for name, value in vars(conv).items() if name[0] != "_"}
    names = set(vars(conv))
    excite_owner(
        conv, "weight", build_excitation([{"mwe": {}}], WeightLayout((6, 8, 3, 3))), "conv"
    )
    restore_owner(conv)
    assert set(vars(conv)) == names
    assert {name: value for name, value in vars(conv).items() if name[0] != "_"} == before
    assert not conv._modules


@pytest.mark.parametrize(
    ("parameter", "raw", "excitation"),
    [
        ("weight", "raw_weight", "excitation"),
        ("in_proj_weight", "raw_in_proj_weight", "in_proj_excitation"),
        ("kernel", "raw_kernel", "kernel_excitation"),
    ],
)
def test_the_names_that_a_state_dict_shows(parameter: str, raw: str, excitation: str) -> None:
    assert raw_name(parameter) == raw
    assert excitation_name(parameter) == excitation


def test_one_question_has_one_class() -> None:
    assert excited_class(nn.Conv2d, ("weight",)) is WEConv2d
    assert excited_class(nn.Linear, ("weight",)) is WELinear
    made = excited_class(nn.MultiheadAttention, ("in_proj_weight",))
    assert made is excited_class(nn.MultiheadAttention, ("in_proj_weight",))
    assert made is not excited_class(nn.MultiheadAttention, ("q_proj_weight",))


def test_the_state_dict_has_the_raw_weight_where_the_weight_was() -> None:
    vanilla = ConvNet()
    converted = ws.convert(vanilla)
    places = [re.sub("raw_weight", "weight", name) for name in converted.state_dict()]
    assert [name for name in places if "excitation" not in name] == list(vanilla.state_dict())
    assert list(ws.strip(converted).state_dict()) == list(vanilla.state_dict())


def test_parameters_come_in_an_order_that_optimizers_can_index() -> None:
    vanilla = ConvNet()
    for layer in (vanilla.stem, vanilla.head):
        before = [id(p) for p in layer.parameters()]
        ws.convert(layer, inplace=True)
        assert [id(p) for p in layer.parameters()][: len(before)] == before


def test_the_excited_weight_carries_gradients_to_raw_weight_and_excitation() -> None:
    layer = excited_conv("standardize", "lwe", "mwe")
    layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_gradients_accumulate_over_several_forwards() -> None:
    layer = excited_conv("standardize", "lwe", "mwe")
    x = torch.randn(4, 8, 5, 5)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.split(2):
        layer(part).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_assigning_a_weight_stores_the_raw_weight_that_gives_it() -> None:
    layer = excited_conv("mwe")
    raw, wanted = layer.raw_weight, torch.randn(6, 8, 3, 3)
    layer.weight = nn.Parameter(wanted)
    torch.testing.assert_close(layer.weight, wanted)
    assert layer.raw_weight is raw
    assert not torch.equal(raw, wanted)


def test_assigning_a_weight_that_has_no_inverse_names_the_cure() -> None:
    layer = excited_conv("standardize", "lwe")
    with pytest.raises(ws.ExcitationError) as error:
        layer.weight = nn.Parameter(torch.zeros(6, 8, 3, 3))
    assert "'block.conv' (Conv2d)" in error.value.cause
    assert "standardize+lwe" in error.value.cause
    assert "raw_weight" in error.value.cure


@pytest.mark.parametrize(
    "value",
    [nn.Parameter(torch.zeros(6, 8)), torch.zeros(6, 8, 3, 3), None],
    ids=["shape", "tensor", "None"],
)
def test_assigning_anything_but_a_weight_of_the_shape_is_an_input_error(value: object) -> None:
    layer = excited_conv("mwe")
    before = layer.raw_weight.detach().clone()
    with pytest.raises(ws.InputError, match=re.escape("takes a Parameter of shape (6, 8, 3, 3)")):
        layer.weight = value
    assert torch.equal(layer.raw_weight, before)


def test_other_attributes_are_assigned_as_in_any_module() -> None:
    layer = excited_conv("mwe")
    layer.bias = nn.Parameter(torch.ones(6))
    layer.note = "mine"
    assert torch.equal(layer.state_dict()["bias"], torch.ones(6))
    assert layer.note == "mine"


def test_a_layer_that_a_layers_own_method_makes_is_a_vanilla_one() -> None:
    layer = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "lwe")[0]
    made = layer.__class__(3, 4, kernel_size=1)
    assert type(made) is nn.Conv2d
    assert made.weight.shape == (4, 3, 1, 1)
    assert isinstance(layer, WEConv2d)


class Listed(nn.Module):
    """Weights in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"a:b": torch.randn(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in (*self.listed, *self.named.values()):
            x = F.linear(x, weight)
        return x


def test_weights_in_a_list_are_excited_in_the_attached_form_alone() -> None:
    x = torch.randn(4, 6)
    model = Listed()
    plan = ws.plan(model, "mwe", example_inputs=x)
    assert [row.verdict for row in plan.decisions] == ["skip", "skip", "MWE"]
    assert "belongs to a ParameterList" in plan.decisions[0].reason
    attached = ws.plan(model, "mwe", example_inputs=x, form="attached")
    assert [row.verdict for row in attached.decisions] == ["MWE"] * 3
    converted = ws.convert(model, plan=plan, example_inputs=x)
    assert not torch.equal(converted.named["a:b"], model.named["a:b"])
    assert torch.equal(ws.strip(converted, example_inputs=x)(x), converted(x))


def test_folding_a_batch_norm_into_an_mwe_conv_is_right() -> None:
    conv, norm = excited_conv("mwe"), nn.BatchNorm2d(6)
    norm(torch.randn(4, 6, 3, 3) * 3 + 1)
    conv.eval(), norm.eval()
    fused = fuse_conv_bn_eval(conv, norm)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_folding_a_batch_norm_into_an_lwe_conv_is_refused() -> None:
    conv, norm = excited_conv("lwe").eval(), nn.BatchNorm2d(6).eval()
    with pytest.raises(ws.ExcitationError, match="strip the model first"):
        fuse_conv_bn_eval(conv, norm)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_an_error_in_the_excitation_keeps_its_type_and_names_the_layer(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = excited_conv("mwe")

    def fail(weight: Tensor) -> Tensor:
        raise error("broken")

    monkeypatch.setattr(layer.excitation, "forward", fail)
    with pytest.raises(error, match="broken") as caught:
        layer(torch.randn(1, 8, 3, 3))
    assert any("'block.conv' (Conv2d)" in note for note in caught.value.__notes__)


def test_an_attribute_error_in_the_excitation_does_not_become_a_missing_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = excited_conv("mwe")

    def fail(weight: Tensor) -> Tensor:
        return weight.no_such_thing

    monkeypatch.setattr(layer.excitation, "forward", fail)
    with pytest.raises(ws.ExcitationError, match="no_such_thing") as caught:
        layer(torch.randn(1, 8, 3, 3))
    assert "weight of layer 'block.conv' (Conv2d)" in str(caught.value)


def test_a_removed_excitation_is_named_as_the_cause() -> None:
    layer = excited_conv("mwe")
    del layer.excitation
    with pytest.raises(ws.ExcitationError, match="'excitation' was removed or replaced"):
        _ = layer.weight


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_initializes_the_raw_weight_and_keeps_the_excitation(name: str) -> None:
    vanilla = LAYERS[name]()
    layer = ws.convert(vanilla, config=EVERYTHING)
    excitation = copy.deepcopy(layer.excitation.state_dict())
    torch.manual_seed(1)
    vanilla.reset_parameters()
    torch.manual_seed(1)
    layer.reset_parameters()
    assert torch.equal(layer.raw_weight, vanilla.weight)
    assert all(torch.equal(v, excitation[k]) for k, v in layer.excitation.state_dict().items())


def test_attention_is_reset_by_the_method_it_has() -> None:
    vanilla = nn.MultiheadAttention(8, 2)
    layer = ws.convert(vanilla)
    torch.manual_seed(1)
    vanilla._reset_parameters()
    torch.manual_seed(1)
    layer._reset_parameters()
    assert torch.equal(layer.raw_in_proj_weight, vanilla.in_proj_weight)
    assert not hasattr(layer, "reset_parameters")


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_survive_conversion_and_strip(inplace: bool) -> None:
    calls: list[str] = []
    model = ConvNet()
    layer = model.head
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    converted = ws.convert(model, inplace=inplace)
    converted(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    stripped = ws.strip(converted, inplace=inplace)
    stripped(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == ["pre", "forward", "backward"] * 2


def test_fuse_returns_a_vanilla_layer_and_leaves_the_excited_one() -> None:
    layer = excited_conv("standardize", "lwe")
    fused = layer.fuse()
    assert type(fused) is nn.Conv2d
    assert list(fused.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(fused(x), layer(x))
    assert isinstance(layer, WEConv2d)
    assert fused.weight.data_ptr() != layer.raw_weight.data_ptr()
    fused.bias.data.zero_()
    assert layer.bias.any()


def test_a_fused_layer_is_as_frozen_as_the_raw_weight_was() -> None:
    layer = excited_conv("lwe")
    assert layer.fuse().weight.requires_grad
    layer.raw_weight.requires_grad_(False)
    assert not layer.fuse().weight.requires_grad
    assert layer.fuse().bias.requires_grad


def test_fusing_attention_fuses_the_layers_inside_it() -> None:
    layer = ws.convert(nn.MultiheadAttention(8, 2)).eval()
    fused = layer.fuse()
    assert is_vanilla(fused)
    x = torch.randn(3, 2, 8)
    assert torch.equal(fused(x, x, x)[0], layer(x, x, x)[0])


def test_a_failed_swap_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sealed(nn.Conv2d):
        __class__ = property(lambda self: Sealed)  # type: ignore[assignment]

    conv = Sealed(8, 6, 3)
    names, weight = set(vars(conv)), conv.weight
    excitation = build_excitation([{"mwe": {}}], WeightLayout((6, 8, 3, 3)))
    with pytest.raises(AttributeError), AllOrNothing([conv]):
        excite_owner(conv, "weight", excitation, "conv")
    assert set(vars(conv)) == names
    assert list(conv._parameters) == ["weight", "bias"]
    assert conv.weight is weight
    assert not conv._modules


def test_an_excited_layer_survives_being_replicated_as_data_parallel_does() -> None:
    layer = excited_conv("standardize", "lwe", "mwe")
    replica = layer._replicate_for_data_parallel()
    replica.excitation = layer.excitation
    replica.raw_weight = layer.raw_weight
    replica.bias = layer.bias
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(replica(x), layer(x))
