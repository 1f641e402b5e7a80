"""A sample of the zoo through the very check of benchmarks/zoo.py, and faults it must notice."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import timm
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_check import check_model
from zoo_list import family_of, pinned_models, torchvision_models
from zoo_row import short_reason

import we_surgery as ws
from we_surgery.converted.layer import ExcitedLayer

# Weights in the plan, and of these converted.
SAMPLE: dict[str, tuple[int, int]] = {
    "timm:test_convnext": (32, 32),
    "timm:test_efficientnet_evos": (18, 14),
    "timm:test_vit": (26, 26),
    "timm:test_nfnet": (34, 26),
    "timm:test_mambaout": (25, 25),
    "timm:test_byobnet": (23, 15),
    "timm:test_coatnet": (28, 24),
    "timm:test_vit_relpos": (56, 38),
    "timm:test_maxvit": (58, 50),
    "timm:eva02_tiny_patch14_224": (49, 49),
    "timm:test_resnet": (16, 16),
    "timm:gmixer_12_224": (50, 50),
    "timm:vit_tiny_r_s16_p8_224": (51, 51),
    "timm:efficientvit_b0": (52, 52),
    "timm:resnest14d": (28, 20),
    "timm:resnetv2_50x1_bit": (54, 54),
    "timm:swiftformer_xs": (83, 79),
    "timm:resnet18": (21, 21),
    "torchvision:squeezenet1_1": (26, 26),
    "torchvision:raft_small": (53, 53),
    "torchvision:lraspp_mobilenet_v3_large": (66, 50),
    "torchvision:ssdlite320_mobilenet_v3_large": (98, 82),
    "torchvision:mc3_18": (21, 21),
    "torchvision:swin_t": (53, 53),
    "torchvision:shufflenet_v2_x0_5": (57, 57),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_the_zoo_keeps_every_promise(name: str) -> None:
    row = check_model(name, preserved=["lwe+mwe"])
    if timm.__version__ == "1.0.21" and "Unknown model" in row.cause:
        pytest.skip("the oldest timm has no such model")
    assert row.passed, row.cause
    assert list(row.preserved) == ["lwe+mwe"]
    assert row.read_by == "recorded"
    assert (row.weights, row.converted) == SAMPLE[name], row.alone
    assert row.weights - row.converted == sum(row.alone.values())
    assert row.difference is not None
    assert row.difference <= 1e-5
    left = {short_reason(reason) for reason in row.exceptions.values()}
    assert left <= {"is multiplied as x @ W, whose filters are not its first axis"}


def raw_conv(self: Any, x: Tensor) -> Tensor:
    weight, *bias = self.parameters(recurse=False)
    return F.conv2d(x, weight, *bias, stride=self.stride, padding=self.padding, groups=self.groups)


def raw_conv_in_training(self: Any, x: Tensor) -> Tensor:
    return raw_conv(self, x) if self.training else type(self).forward(self, x)


def a_conv(model: nn.Module) -> Any:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)][2]


def read_raw(model: nn.Module) -> None:
    conv = a_conv(model)
    conv.forward = MethodType(raw_conv, conv)


def read_raw_in_training(model: nn.Module) -> None:
    conv = a_conv(model)
    conv.forward = MethodType(raw_conv_in_training, conv)


def remember_the_head(model: Any) -> None:
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    kept = [head.weight, head.bias]
    model.kept = kept

    def forward(self: Any, x: Tensor) -> Tensor:
        features = self.forward_head(self.forward_features(x), pre_logits=True)
        return F.linear(features, *self.kept)

    model.forward = MethodType(forward, model)


def silence(model: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return type(self).forward(self, x).new_zeros(2, 3)

    model.forward = MethodType(forward, model)


def reorder(model: nn.Module) -> None:
    layer = next(m for m in model.modules() if isinstance(m, ExcitedLayer) and m.bias is not None)
    layer._parameters["raw_weight"] = layer._parameters.pop("raw_weight")


def forget_a_class(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.__class__ = type("Norm", (type(norm),), {})


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        (read_raw, None, r"aten\.convolution in module '.*' reads '.*raw_weight' itself"),
        (read_raw_in_training, None, r"aten\.convolution in module .* reads '.*raw_weight' itself"),
        (remember_the_head, None, r"reads '.*raw_weight' itself"),
        (silence, None, "outputs are those of the raw weights|not used"),
        (None, reorder, "keys after strip"),
        (None, forget_a_class, "classes after strip"),
    ],
)
def test_a_planted_fault_is_noticed(
    before: Callable[[nn.Module], None] | None,
    after: Callable[[nn.Module], None] | None,
    cause: str,
) -> None:
    row = check_model("timm:test_resnet", preserved=[], before=before, after=after)
    assert not row.passed
    assert re.search(cause, row.cause), row.cause


def test_a_model_that_cannot_be_built_is_a_row_with_its_cause() -> None:
    row = check_model("timm:no_such_model")
    assert not row.passed
    assert "no_such_model" in row.cause


def test_the_pinned_list_holds_all_of_torchvision_and_each_name_once() -> None:
    names = pinned_models()
    assert len(names) == len(set(names)) >= 380
    assert set(torchvision_models()) <= set(names)
    assert set(SAMPLE) <= set(names)


def test_a_family_is_a_name_without_sizes_and_numbers() -> None:
    families = {"timm:seresnext26d_32x4d": "seresnextd", "timm:vit_tiny_patch16_224": "vit"}
    assert {name: family_of(name) for name in families} == families


def test_a_start_that_changes_the_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: nn.Module, **options: Any) -> nn.Module:
        converted = ws_convert(model, **options)
        if options.get("init") == "preserve":
            nn.init.uniform_(a_conv(converted).raw_weight)
        return converted

    ws_convert = ws.convert
    monkeypatch.setattr(ws, "convert", convert)
    row = check_model("timm:test_resnet", preserved=["mwe"])
    assert re.search('init="preserve" changed the outputs', row.cause), row.cause
