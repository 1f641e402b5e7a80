"""A sample of the zoo's third-party models, of those libraries that are installed."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo_check import check_model
from zoo_libraries import LIBRARIES
from zoo_list import THIRD_PARTY
from zoo_promises import (
    ZooError,
    check_folded_state,
    generators_untouched,
    no_fakes_left,
    refuse_fake_outputs,
)

BY_CLASS = "inside an attention gate, by its class"
BY_DATA = "inside an attention gate, by what the data does"
FROZEN = "frozen: its weight does not require a gradient"

# Why torch's own conv and linear layers are left alone, where some are.
SAMPLE: dict[str, set[str]] = {
    "transformers:bert": set(),
    "transformers:vit": set(),
    "transformers:clip": set(),
    "transformers:dinov2": set(),
    "transformers:resnet": set(),
    "transformers:gpt_neox": set(),
    "transformers:t5": set(),
    "transformers:convnext": set(),
    "smp:Unet/resnet18": set(),
    "smp:Unet/efficientnet-b0": set(),
    "smp:MAnet/tu-mobilenetv3_small_050": {BY_CLASS, BY_DATA},
    "smp:PSPNet/tu-mobilenetv3_small_050": {BY_CLASS},
    "monai:AttentionUnet-2d": {BY_DATA},
    "monai:UNet-3d": set(),
    "monai:SEResNet50": {BY_DATA},
    "monai:DynUNet-2d": set(),
    "monai:ViT": set(),
    "monai:DiffusionModelUNet": set(),
    "ultralytics:yolov8-cls": set(),
    "ultralytics:yolo11": {FROZEN},
    "diffusers:UNet2DModel": set(),
    "diffusers:UNet2DConditionModel": set(),
    "diffusers:AutoencoderKL": set(),
    "diffusers:FluxTransformer2DModel": set(),
    "open_clip:ViT-B-16": set(),
    "vit_pytorch:vit/ViT": set(),
    "vit_pytorch:cct/CCT": set(),
    "vit_pytorch:levit/LeViT": set(),
    "vit_pytorch:cvt/CvT": set(),
    "vit_pytorch:nest/NesT": set(),
    "pytorchcv:resneta10": set(),
    "pytorchcv:preresnet20_cifar10": set(),
    "pytorchcv:seresnet20_cifar10": {BY_CLASS},
    "pytorchcv:mobilenetv3_large_wd2": {BY_CLASS},
    "torch_geometric:GCNConv": set(),
    "torch_geometric:GraphUNet": set(),
    "torch_geometric:GAT": set(),
    "torchaudio:ConvTasNet": set(),
    "kornia:HardNet": set(),
    "peft:bert/LoraConfig": {FROZEN},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", SAMPLE)
def test_a_third_party_model_keeps_every_promise(name: str) -> None:
    if find_spec(LIBRARIES[name.partition(":")[0]]) is None:
        pytest.skip("its library is not installed")
    row = check_model(name, preserved=["lwe+mwe"])
    assert row.passed, row.cause
    assert row.converted > 0
    assert set(row.plain_alone) == SAMPLE[name]


def test_the_sample_is_in_the_zoo_and_of_every_library() -> None:
    assert SAMPLE.keys() <= set(THIRD_PARTY.read_text(encoding="utf-8").splitlines())
    assert {name.partition(":")[0] for name in SAMPLE} == set(LIBRARIES)


def test_a_fake_tensor_that_is_left_is_noticed() -> None:
    left: list[Tensor] = []

    class Caching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return left[0] if left else x

    refuse_fake_outputs(Caching(), torch.ones(2))
    with pytest.raises(ZooError, match="1 fake tensors outlive the reading"), no_fakes_left():
        left.append(FakeTensorMode().from_tensor(torch.ones(2)))
    with pytest.raises(ZooError, match="returns fake tensors"):
        refuse_fake_outputs(Caching(), torch.ones(2))


def test_a_fake_tensor_of_somebody_else_is_nobodys_fault() -> None:
    elsewhere = FakeTensorMode().from_tensor(torch.ones(2))
    with no_fakes_left():
        FakeTensorMode().from_tensor(torch.ones(2))
    assert elsewhere.shape == (2,)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: random.random()])
def test_a_draw_from_a_generator_is_noticed(draw) -> None:
    with pytest.raises(ZooError, match="the plan moves"), generators_untouched("the plan"):
        draw()


def test_a_folded_state_that_differs_is_noticed() -> None:
    model = nn.Linear(2, 2)
    check_folded_state(dict(model.state_dict()), model)
    with pytest.raises(ZooError, match="other keys"):
        check_folded_state({"weight": model.weight}, model)
    other = {key: value + 1 for key, value in model.state_dict().items()}
    with pytest.raises(ZooError, match="gives weight other values"):
        check_folded_state(other, model)
