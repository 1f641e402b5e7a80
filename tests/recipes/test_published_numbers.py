"""Each number that the papers' text and tables give is in the recipe that is about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

import we_surgery as ws
from we_surgery._util.shipped import RECIPES, names_in
from we_surgery.recipes import load_recipe

IMAGENET: dict[str, tuple[float, float]] = {  # Tables 1 to 5 of the WE paper: top-1, top-5
    "mobilenetv2": (66.2, 87.1),
    "mobilenetv2-lwe": (66.5, 87.3),
    "mobilenetv2-we": (67.0, 87.5),
    "mobilenetv2-se": (67.3, 87.8),
    "mobilenetv2-we-se": (68.1, 88.2),
    "resnet18": (70.6, 89.5),
    "resnet18-lwe": (71.0, 90.0),
    "resnet18-se": (71.0, 90.1),
    "resnet18-lwe-se": (71.7, 90.5),
    "resnet50-bam": (76.0, 92.8),
    "resnet50-se": (77.1, 93.5),
    "resnet50-cbam": (77.2, 93.7),
    "resnet50-lwe-se": (77.5, 93.8),
    "resnet50-lwe-bam": (77.4, 93.7),
    "resnet50-lwe-cbam": (77.7, 93.9),
    "resnext50": (77.2, 93.4),
    "resnext50-lwe": (77.7, 93.8),
    "resnext50-se": (77.8, 93.9),
    "resnext50-lwe-se": (78.1, 94.1),
    "wideresnet50-2": (77.3, 93.5),
    "wideresnet50-2-lwe": (78.3, 94.2),
    "wideresnet50-2-se": (78.3, 94.2),
    "wideresnet50-2-lwe-se": (78.6, 94.3),
    "resnet152": (77.9, 93.8),
    "resnet152-lwe": (78.6, 94.3),
    "resnet152-se": (78.7, 94.3),
    "resnet152-lwe-se": (79.0, 94.6),
    "resnet50-weight-standardization": (76.1, 92.9),
    "resnet50-weight-normalization": (76.0, 92.9),
    "resnet50-spectral-normalization": (75.7, 92.8),
    "resnet50-lwe-90-epochs": (76.9, 93.4),
    "resnet50": (75.8, 92.8),
    "resnet50-mwe": (76.52, 93.1),
    "resnet50-lwe": (77.1, 93.5),
    "resnet50-lwe+mwe": (77.09, 93.5),
    "resnet50-gn": (75.5, 92.7),
    "resnet50-gn-weight-normalization": (75.9, 92.9),
    "resnet50-gn-weight-standardization": (76.0, 92.9),
    "resnet50-gn-lwe": (76.8, 93.3),
    "resnet50-mwe-epsilon-0.001": (76.38, 93.0),
    "resnet50-mwe-epsilon-0.2": (76.43, 93.0),
}
OTHERS = {  # section 4.2, Table 6, supplement, and the thesis' tables
    "imagenet/resnet50-adamw": 70.9,
    "imagenet/resnet50-adamw-se": 71.2,
    "imagenet/resnet50-adamw-lwe": 72.0,
    "imagenet/resnet50-lwe-xavier": 77.1,
    "imagenet/resnet50-without-norm-lwe": 52.4,
    "imagenet/resnet18-5-epochs": 55.256,
    "imagenet/resnet18-5-epochs-lwe": 56.312,
    "imagenet/resnet18-5-epochs-thesis": 56.966,
    "imagenet/resnet18-5-epochs-global": 55.944,
    "cifar100/vgg19": 73.2,
    "cifar100/vgg19-lwe": 73.8,
    "cifar100/resnext29": 80.5,
    "cifar100/resnext29-lwe": 81.5,
    "cifar100/resnext29-lwe-again": 80.7,
    "cifar100/resnext29-cbam": 80.1,
    "cifar100/resnext29-triplet": 80.1,
    "cifar100/resnext29-thesis": 81.63,
    "cifar100/resnext29-10-epochs": 36.78,
    "cifar100/resnext29-10-epochs-lwe": 37.86,
    "cifar100/resnext29-10-epochs-cbam": 39.76,
    "cifar100/resnext29-table-6.8": 77.961,
    "cifar100/resnext29-mwe": 78.529,
    "cifar100/resnext29-mwe-novel": 77.719,
    "cifar100/mixer": 54.27,
    "cifar100/mixer-mwe": 54.63,
    "cinic10/resnet18": 77.96,
    "cinic10/resnet18-lwe": 78.52,
    "cinic10/resnet18-thesis": 78.53,
    "cinic10/activations/plain": 80.75,
    "cinic10/activations/relu-sigmoid": 82.01,
    "cinic10/activations/swish-relu": 78.72,
    "cinic10/activations/relu-tanh": 80.68,
    "cinic10/activations/relu-swish": 80.72,
    "cinic10/activations/swish-swish": 80.84,
    "cinic10/activations/leaky-relu-tanh": 81.03,
    "cinic10/activations/swish-sigmoid": 82.40,
    "cinic10/activations/leaky-relu-sigmoid": 82.74,
    "voc/deeplabv3-resnet50": 74.4,
    "voc/deeplabv3-resnet50-mwe": 75.2,
    "voc/deeplabv3-resnet50-lwe": 75.7,
    "cityscapes/deeplabv3-resnet50": 76.0,
    "cityscapes/deeplabv3-resnet50-lwe": 76.7,
    "mini-kinetics/r3d-18": 43.7,
    "mini-kinetics/r3d-18-lwe": 44.3,
    "jester/tsm-resnet50": 96.3,
    "jester/tsm-resnet50-mwe": 96.6,
}
SGD = {"opt": "momentum", "momentum": 0.9}


@pytest.mark.parametrize("name", IMAGENET)
def test_the_figures_of_tables_1_to_5(name: str) -> None:
    recipe = load_recipe(f"imagenet/{name}")
    assert (recipe.published["top1"], recipe.published["top5"]) == IMAGENET[name]


@pytest.mark.parametrize("name", OTHERS)
def test_the_figures_of_the_other_tables(name: str) -> None:
    published = load_recipe(name).published
    assert published.get("top1", published.get("miou")) == OTHERS[name]


def settings(name: str) -> dict[str, Any]:
    training = load_recipe(name).training
    return {
        "epochs": training.epochs,
        "batch": training.batch_size,
        **training.optimizer,
        **training.schedule,
    }


def learning_rates(name: str) -> list[float]:
    """The learning rate of each epoch."""
    training = load_recipe(name).training
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.optimizer["lr"])
    made = create_scheduler_v2(optimizer, num_epochs=training.epochs, **training.schedule)
    rates = []
    for epoch in range(made[1]):
        made[0].step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def steps(first: float, *epochs: int) -> list[float]:
    return [first * 0.1**number for number, count in enumerate(epochs) for _ in range(count)]


@pytest.mark.parametrize("name", IMAGENET)
def test_section_4_2_trains_all_networks_alike(name: str) -> None:
    expected = {**SGD, "batch": 128 if "resnet152" in name else 256, "weight_decay": 1e-4}
    found = settings(f"imagenet/{name}")
    assert {key: found[key] for key in expected} == expected
    shorter = name.endswith("90-epochs")
    rates = steps(0.1, 27, 27, 27, 9) if shorter else steps(0.1, 30, 30, 30, 10)
    assert learning_rates(f"imagenet/{name}") == pytest.approx(rates)
    data = load_recipe(f"imagenet/{name}").data
    assert (data.crop, data.flip, data.color_jitter) == ("resized", True, 0.0)
    assert (data.input_size, data.crop_pct) == ((3, 224, 224), 224 / 256)  # a single crop


THESIS = [name for name in names_in(RECIPES) if name.startswith("cifar100/resnext29")]


@pytest.mark.parametrize("name", ["cifar100/vgg19", "cifar100/vgg19-lwe", *THESIS])
def test_section_4_3_trains_all_networks_alike(name: str) -> None:
    expected = {**SGD, "batch": 256, "weight_decay": 5e-4}
    found = settings(name)
    assert {key: found[key] for key in expected} == expected
    rates = steps(0.1, 10) if "10-epochs" in name else steps(0.1, 81, 41, 42)
    assert learning_rates(name) == pytest.approx(rates)


@pytest.mark.parametrize(
    "name",
    [
        "mini-kinetics/r3d-18",
        "mini-kinetics/r3d-18-lwe",
        "jester/tsm-resnet50",
        "jester/tsm-resnet50-mwe",
    ],
)
def test_sections_4_5_and_4_6_train_alike(name: str) -> None:
    expected = {**SGD, "batch": 64, "weight_decay": 5e-4}
    found = settings(name)
    assert {key: found[key] for key in expected} == expected
    assert learning_rates(name) == pytest.approx(steps(0.02, 20, 20, 10))
    assert load_recipe(name).data.frames == 16


@pytest.mark.parametrize("name", ["wrn-16-8", "wrn-16-8-dst", "wrn-16-8-lwe-dst"])
def test_dynamic_sparse_training_is_that_of_its_public_code(name: str) -> None:
    recipe = load_recipe(f"cifar10/{name}")
    expected = {**SGD, "batch": 64, "weight_decay": 1e-4}
    found = settings(f"cifar10/{name}")
    assert {key: found[key] for key in expected} == expected
    assert learning_rates(f"cifar10/{name}") == pytest.approx(steps(0.1, 80, 40, 40))
    assert recipe.training.sparsity == (5e-6 if "dst" in name else 0.0)


@pytest.mark.parametrize("name", ["", "-se", "-lwe"])
def test_adamw_anneals_in_four_cycles(name: str) -> None:
    found = settings(f"imagenet/resnet50-adamw{name}")
    assert (found["opt"], found["lr"], found["weight_decay"]) == ("adamw", 1e-3, 0.1)
    rates = learning_rates(f"imagenet/resnet50-adamw{name}")
    starts = [epoch for epoch in range(1, len(rates)) if rates[epoch] > rates[epoch - 1]]
    assert starts == [5, 11, 19]  # of cycles of 5, 6, 7.2 and 8.64 epochs
    assert len(rates) == 27
    assert [rates[epoch] for epoch in (0, 5, 11)] == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize("task", ["voc", "cityscapes"])
def test_segmentation_is_that_of_the_public_codes(task: str) -> None:
    recipe = load_recipe(f"{task}/deeplabv3-resnet50")
    found = settings(f"{task}/deeplabv3-resnet50")
    expected = {**SGD, "batch": 16, "weight_decay": 1e-4, "sched": "poly", "decay_rate": 0.9}
    assert {key: found[key] for key in expected} == expected
    rate, side, scale = {"voc": (0.007, 513, 1.0), "cityscapes": (0.1, 768, 0.1)}[task]
    assert (found["lr"], recipe.training.backbone_lr_scale) == (rate, scale)
    assert recipe.data.input_size == (3, side, side)
    steps_of_an_epoch = {"voc": 10_582, "cityscapes": 2_975}[task] // 16
    updates = recipe.training.epochs * steps_of_an_epoch
    assert updates == pytest.approx({"voc": 50 * 661, "cityscapes": 30_000}[task], rel=0.01)


@pytest.mark.parametrize(
    ("folder", "epochs"),
    [("imagenet/resnet18-5-epochs", 5), ("cinic10/", 50), ("cifar100/mixer", 30)],
)
def test_the_epochs_of_the_thesis(folder: str, epochs: int) -> None:
    found = [load_recipe(name) for name in names_in(RECIPES) if name.startswith(folder)]
    assert {recipe.training.epochs for recipe in found} == {epochs}
    assert len(found) > 2


PARAMETERS = {  # of training, in millions: Table 1, where there is an attention
    "mobilenetv2-se": 3.6,
    "mobilenetv2-we-se": 4.2,
    "resnet18-se": 11.8,
    "resnet18-lwe-se": 11.9,
    "resnet50-bam": 25.9,
    "resnet50-se": 28.1,
    "resnet50-cbam": 28.1,
    "resnet50-lwe-se": 30.6,
    "resnet50-lwe-bam": 28.4,
    "resnet50-lwe-cbam": 30.6,
    "resnext50-se": 27.5,
    "resnext50-lwe-se": 30.4,
    "wideresnet50-2-lwe-se": 74.9,
    "resnet152-lwe-se": 73.9,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_attention_is_as_large_as_in_table_1(name: str) -> None:
    recipe = load_recipe(f"imagenet/{name}")
    with torch.device("meta"):
        model = recipe.model.build()
    converted = ws.convert(model, config=recipe.surgery, inplace=True)
    found = sum(parameter.numel() for parameter in converted.parameters()) / 1e6
    # The paper prints one digit, and does not say where SE stands in MobileNetV2.
    assert found == pytest.approx(PARAMETERS[name], abs=0.07)


def test_the_options_of_the_excitations() -> None:
    def surgery(name: str) -> Any:
        return load_recipe(name).surgery

    assert surgery("imagenet/resnet50-mwe").get("mwe", {}).get("epsilon", 0.1) == 0.1
    assert surgery("imagenet/resnet50-mwe-epsilon-0.001")["mwe"]["epsilon"] == 1e-3
    assert surgery("imagenet/resnet50-mwe-epsilon-0.2")["mwe"]["epsilon"] == 0.2
    assert surgery("imagenet/resnet50-lwe-reduction-8")["lwe"]["reduction"] == 8
    assert surgery("imagenet/resnet50-lwe").get("lwe", {}).get("reduction", 16) == 16
    assert 0 < surgery("cifar100/mixer-mwe-all-layers")["mwe"]["epsilon"] < 0.2
    assert load_recipe("jester/tsm-resnet50").data.sampling == "strided"
    assert load_recipe("mini-kinetics/r3d-18").data.sampling == "dense"


@pytest.mark.parametrize("network", ["voc/deeplabv3-resnet50-lwe", "voc/deeplabv3-resnet50-mwe"])
def test_all_weights_but_depthwise_ones_are_normalized(network: str) -> None:
    assert load_recipe(network).surgery["standardize"] in ("on", True)
