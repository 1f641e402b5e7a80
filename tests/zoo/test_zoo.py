"""Whole real models of torchvision and timm: convert, train a step, strip, compare."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.excitations.names import excitation_name, raw_name

Maker = Callable[[], nn.Module]


def from_torchvision(name: str, **options: Any) -> Maker:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def from_timm(name: str, **options: Any) -> Maker:
    return lambda: timm.create_model(name, **options)


IMAGE = (2, 3, 64, 64)
MODELS: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "resnet18": (from_torchvision("resnet18"), IMAGE),
    "mobilenet_v2": (from_torchvision("mobilenet_v2"), IMAGE),
    "efficientnet_b0": (from_torchvision("efficientnet_b0"), IMAGE),
    "convnext_tiny": (from_torchvision("convnext_tiny"), IMAGE),
    "swin_t": (from_torchvision("swin_t"), IMAGE),
    "vit_b_16": (from_torchvision("vit_b_16", image_size=32), (2, 3, 32, 32)),
    "r3d_18": (from_torchvision("r3d_18"), (2, 3, 4, 32, 32)),
    "deeplabv3_resnet50": (
        from_torchvision("deeplabv3_resnet50", weights_backbone=None, num_classes=3),
        (2, 3, 32, 32),
    ),
    "mixer_s16_224": (from_timm("mixer_s16_224", img_size=64), IMAGE),
    "resnetv2_50": (from_timm("resnetv2_50"), IMAGE),
    "tf_efficientnetv2_b0": (from_timm("tf_efficientnetv2_b0"), IMAGE),
    "beit_base": (from_timm("beit_base_patch16_224", depth=2, img_size=64), IMAGE),
}
CASES = [(name, "lwe") for name in MODELS] + [
    ("resnet18", "mwe"),
    ("resnet18", "lwe+mwe"),
    ("mobilenet_v2", "we"),
    ("mobilenet_v2", "lwe+mwe"),
    ("swin_t", "mwe"),
    ("tf_efficientnetv2_b0", "we"),
    ("beit_base", "lwe+mwe"),
]
EXCITED = {
    "resnet18": 21,
    "mobilenet_v2": 36,
    "efficientnet_b0": 34,
    "convnext_tiny": 41,
    "swin_t": 53,
    "vit_b_16": 50,
    "r3d_18": 21,
    "deeplabv3_resnet50": 61,
    "mixer_s16_224": 34,
    "resnetv2_50": 54,
    "tf_efficientnetv2_b0": 44,
    "beit_base": 10,
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # one step of training is all that the statistics get
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.01:
            nn.init.normal_(parameter, std=0.02)  # some heads start at 0, and pass no gradient on
    return model, torch.randn(shape)


def train_a_step(model: nn.Module, x: Tensor) -> float:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    outputs = [leaf for leaf in tree_leaves(model.train()(x)) if isinstance(leaf, Tensor)]
    targets = [torch.randn_like(output) for output in outputs]
    loss = sum((o - t).square().mean() for o, t in zip(outputs, targets, strict=True))
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_real_model_is_converted_trained_and_stripped_exactly(name: str, mode: str) -> None:
    vanilla, x = build(name)
    description = [(key, type(module)) for key, module in vanilla.named_modules()]
    keys = list(vanilla.state_dict())

    model = ws.convert(vanilla, mode, inplace=True)
    layers = dict(excited_layers(model))
    if mode == "lwe":
        assert sum(len(layer.excited_parameters) for layer in layers.values()) == EXCITED[name]
    assert torch.isfinite(torch.tensor(train_a_step(model, x)))
    for key, layer in layers.items():
        for parameter in layer.excited_parameters:
            trained = [getattr(layer, raw_name(parameter))]
            trained += getattr(layer, excitation_name(parameter)).parameters()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), key
    gates = [p for key, p in model.named_parameters() if key.endswith("excitation.lwe.fc2.bias")]
    assert bool(gates) == (mode != "mwe")
    assert all(p.grad.any() for p in gates)

    excited = {
        f"{key}.{parameter}": getattr(layer, parameter).detach().clone()
        for key, layer in layers.items()
        for parameter in layer.excited_parameters
    }
    expected = copy.deepcopy(model).eval()
    stripped, report = ws.strip_with_report(model, example_inputs=x, inplace=True)
    assert report.relative_difference is not None
    assert report.relative_difference <= 1e-5
    assert [(key, type(module)) for key, module in stripped.named_modules()] == description
    state = stripped.state_dict()
    assert list(state) == keys
    assert all(torch.equal(state[key], value) for key, value in excited.items())
    with torch.no_grad():
        found, reference = tree_leaves(stripped.eval()(x)), tree_leaves(expected(x))
    for one, other in zip(found, reference, strict=True):
        assert one.isfinite().all()
        assert one.std() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
