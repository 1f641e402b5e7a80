"""Whoever reads ``child.weight`` gets the excited weight: parents, fused kernels, subclasses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from toys import EVERYTHING, is_vanilla, substituted

import we_surgery as ws
from we_surgery.converted.layer import excited_layers

MODELS: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4]),
    "swin_v2": lambda: timm.create_model(
        "swinv2_cr_tiny_224", img_size=32, window_size=4, embed_dim=24, depths=(2,), num_heads=(2,)
    ),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64),
    "beit": lambda: timm.create_model(
        "beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3
    ),
    "eva02": lambda: timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, depth=2, qkv_fused=True
    ),
}
READ_BY_PARENT = {
    "swin": "attn.qkv",
    "swin_v2": "attn.qkv",
    "vit": "in_proj_weight",
    "beit": "attn.qkv",
    "eva02": "attn.qkv",
}


@pytest.fixture(params=MODELS)
def parent(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        if not parameter.any():  # some heads start as zeros, which hide all that is before them
            nn.init.normal_(parameter, std=0.1)
    return request.param, model


def image(name: str) -> Tensor:
    return torch.randn(2, 3, *[28 if name == "eva02" else 32] * 2)


def test_a_model_whose_parents_read_weights_computes_with_the_excited_ones(
    parent: tuple[str, nn.Module],
) -> None:
    name, vanilla = parent
    x = image(name)
    converted = ws.convert(vanilla, config=EVERYTHING)
    by_hand = substituted(vanilla, converted)
    assert not torch.equal(converted(x), vanilla(x))
    assert torch.equal(converted(x), by_hand(x))
    with torch.no_grad():
        assert torch.equal(converted(x), by_hand(x))
    converted.train(), by_hand.train()
    torch.manual_seed(1)
    expected = by_hand(x)
    torch.manual_seed(1)
    assert torch.equal(converted(x), expected)


def test_a_weight_that_only_a_parent_reads_gets_its_gradient(
    parent: tuple[str, nn.Module],
) -> None:
    name, vanilla = parent
    config = {"mode": "lwe", "conv": "skip", "linear": "skip"}
    rule = ws.Rule(f"*{READ_BY_PARENT[name]}", "lwe")
    converted = ws.convert(vanilla, config=config, rules=[rule])
    layers = [layer for _, layer in excited_layers(converted)]
    assert layers
    converted(image(name)).square().sum().backward()
    gradients = [p.grad for key, p in converted.named_parameters() if key.endswith("lwe.fc2.bias")]
    assert len(gradients) == len(layers)
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_model_whose_parents_read_weights_strips_to_bit_equal_outputs(
    parent: tuple[str, nn.Module],
) -> None:
    name, vanilla = parent
    x = image(name)
    converted = ws.convert(vanilla, config=EVERYTHING)
    stripped, report = ws.strip_with_report(converted, example_inputs=x)
    assert is_vanilla(stripped)
    assert report.output_difference == 0
    assert torch.equal(stripped(x), converted(x))


ATTENTION: dict[str, dict[str, Any]] = {
    "same width": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10},
    "other value width": {"vdim": 10},
}


def attention(case: str) -> tuple[nn.MultiheadAttention, tuple[Tensor, Tensor, Tensor]]:
    options = ATTENTION[case]
    layer = nn.MultiheadAttention(8, 2, **options)
    query = torch.randn(3, 3, 8)
    if "kdim" not in options and "vdim" not in options:
        return layer, (query, query, query)
    key = torch.randn(3, 3, options.get("kdim", 8))
    return layer, (query, key, torch.randn(3, 3, options["vdim"]))


@pytest.mark.parametrize("mode", ["train", "eval", "eval, no gradient"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_computes_with_the_excited_projections(
    case: str, need_weights: bool, mode: str
) -> None:
    vanilla, inputs = attention(case)
    vanilla.train(mode == "train")
    converted = ws.convert(vanilla, config=EVERYTHING)
    by_hand = substituted(vanilla, converted)
    with torch.set_grad_enabled("no gradient" not in mode):
        found, attended = converted(*inputs, need_weights=need_weights)
        expected, by_hand_attended = by_hand(*inputs, need_weights=need_weights)
        plain, _ = vanilla(*inputs, need_weights=need_weights)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    if need_weights:
        assert torch.equal(attended, by_hand_attended)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("same width", ["in_proj_weight"]),
        ("other widths", ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
    ],
)
def test_attention_excites_the_projections_it_has(case: str, names: list[str]) -> None:
    vanilla, _ = attention(case)
    order = list(vanilla._parameters)
    converted = ws.convert(vanilla)
    assert list(converted.excited_parameters) == names
    assert [name.removeprefix("raw_") for name in converted._parameters] == order
    assert {"out_proj.raw_weight", *(f"raw_{name}" for name in names)} <= set(
        converted.state_dict()
    )
    stripped = ws.strip(converted)
    assert type(stripped) is nn.MultiheadAttention
    assert list(stripped.state_dict()) == list(vanilla.state_dict())


def test_the_fused_attention_kernel_is_given_the_excited_projections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vanilla, (query, key, value) = attention("batch first")
    converted = ws.convert(vanilla).eval()
    given: list[Any] = []
    kernel = torch._native_multi_head_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        given.extend(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, "_native_multi_head_attention", spy)
    with torch.no_grad():
        converted(query, key, value)
        tensors = [arg for arg in given if isinstance(arg, Tensor)]
        assert any(torch.equal(arg, converted.in_proj_weight) for arg in tensors)
        assert any(torch.equal(arg, converted.out_proj.weight) for arg in tensors)
    assert not any(arg is converted.raw_in_proj_weight for arg in given)


def encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers else layer


@pytest.mark.parametrize("layers", [0, 2], ids=["layer", "encoder"])
def test_the_fused_encoder_kernel_is_given_the_excited_weights(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanilla = encoder(layers).eval()
    converted = ws.convert(vanilla, config=EVERYTHING)
    by_hand = substituted(vanilla, converted)
    calls: list[Any] = []
    kernel = torch._transformer_encoder_layer_fwd

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        found = converted(x)
        assert len(calls) == max(layers, 1)
        assert torch.equal(found, by_hand(x))
    slow = converted(x)
    torch.testing.assert_close(found, slow)


def test_a_padded_batch_goes_through_the_nested_fast_path_with_the_excited_weights() -> None:
    vanilla = encoder(2).eval()
    converted = ws.convert(vanilla, config=EVERYTHING)
    by_hand = substituted(vanilla, converted)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        with pytest.warns(UserWarning, match="nested tensors"):
            found = converted(x, src_key_padding_mask=padding)
        assert torch.equal(found, by_hand(x, src_key_padding_mask=padding))


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "Conv2dSame": lambda: Conv2dSame(4, 6, 3, stride=2),
    "StdConv2d": lambda: StdConv2d(4, 6, 3, padding=1),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(4, 6, 3, padding=1),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_computes_in_its_own_way_with_the_excited_weight(name: str) -> None:
    vanilla = SUBCLASSES[name]()
    converted = ws.convert(vanilla, config=EVERYTHING)
    x = torch.randn(2, 4, 7, 7)
    assert isinstance(converted, type(vanilla))
    assert torch.equal(converted(x), substituted(vanilla, converted)(x))
    assert not torch.equal(converted(x), vanilla(x))
    stripped = ws.strip(converted, example_inputs=x)
    assert type(stripped) is type(vanilla)
    assert torch.equal(stripped(x), converted(x))


def test_a_class_that_standardizes_its_weight_itself_is_not_standardized_twice() -> None:
    rows = ws.plan(nn.Sequential(StdConv2d(4, 6, 3), nn.BatchNorm2d(6)), "lwe").decisions
    assert rows[0].stages == ("lwe",)
    assert "standardizes the weight itself" in rows[0].reason


def test_a_layer_that_two_parents_share_is_excited_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    vanilla = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.ReLU())})
    converted = ws.convert(vanilla)
    assert converted["a"][0] is converted["b"][0]
    assert len(list(excited_layers(converted))) == 1
    stripped = ws.strip(copy.deepcopy(converted))
    assert stripped["a"][0] is stripped["b"][0]
    assert torch.equal(stripped["b"][0].weight, converted["a"][0].weight)
    assert list(stripped.state_dict()) == list(vanilla.state_dict())
