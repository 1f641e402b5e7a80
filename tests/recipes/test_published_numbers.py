"""Each number that the papers' text and tables give is in the recipe that is about it."""

from __future__ import annotations

from typing import Any

import pytest

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


ONE_HUNDRED = {**SGD, "lr": 0.1, "weight_decay": 1e-4, "decay_rate": 0.1, "epochs": 100}
ONE_HUNDRED |= {"decay_milestones": [30, 60, 90]}
CIFAR = {**SGD, "batch": 256, "lr": 0.1, "weight_decay": 5e-4, "decay_rate": 0.1}
CIFAR |= {"decay_milestones": [81, 122], "epochs": 164}
VIDEO = {**SGD, "batch": 64, "lr": 0.02, "weight_decay": 5e-4, "decay_rate": 0.1, "epochs": 50}
VIDEO |= {"decay_milestones": [20, 40]}


@pytest.mark.parametrize("name", IMAGENET)
def test_section_4_2_trains_all_networks_alike(name: str) -> None:
    expected = {**ONE_HUNDRED, "batch": 128 if "resnet152" in name else 256}
    if name.endswith("90-epochs"):
        expected |= {"epochs": 90, "decay_milestones": [27, 54, 81]}
    found = settings(f"imagenet/{name}")
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cifar100/vgg19", "cifar100/resnext29-lwe", "cifar100/resnext29-thesis"), CIFAR),
        (("mini-kinetics/r3d-18-lwe", "jester/tsm-resnet50-mwe"), VIDEO),
        (
            ("imagenet/resnet50-adamw", "imagenet/resnet50-adamw-lwe"),
            {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1, "cycle_mul": 1.2, "cycle_limit": 4},
        ),
        (("imagenet/resnet18-5-epochs-global", "imagenet/resnet18-5-epochs"), {"epochs": 5}),
        (("cifar100/resnext29-10-epochs-cbam", "cifar100/resnext29-10-epochs"), {"epochs": 10}),
        (("cinic10/resnet18-thesis", "cinic10/resnet18"), {"epochs": 50}),
        (("cifar100/mixer", "cifar100/mixer-mwe-all-layers", "cifar10/mixer"), {"epochs": 30}),
    ],
)
def test_the_other_sections_settings(names: tuple[str, ...], expected: dict[str, Any]) -> None:
    for name in names:
        found = settings(name)
        assert {key: found[key] for key in expected} == expected


def test_the_options_of_the_excitations() -> None:
    def surgery(name: str) -> Any:
        return load_recipe(name).surgery

    assert surgery("imagenet/resnet50-mwe").get("mwe", {}).get("epsilon", 0.1) == 0.1
    assert surgery("imagenet/resnet50-mwe-epsilon-0.001")["mwe"]["epsilon"] == 1e-3
    assert surgery("imagenet/resnet50-mwe-epsilon-0.2")["mwe"]["epsilon"] == 0.2
    assert surgery("imagenet/resnet50-lwe-reduction-8")["lwe"]["reduction"] == 8
    assert surgery("imagenet/resnet50-lwe").get("lwe", {}).get("reduction", 16) == 16
    assert 0 < surgery("cifar100/mixer-mwe-all-layers")["mwe"]["epsilon"] < 0.2
    assert load_recipe("mini-kinetics/r3d-18").data.frames == 16
    assert load_recipe("jester/tsm-resnet50").data.sampling == "strided"
    assert load_recipe("mini-kinetics/r3d-18").data.sampling == "dense"


@pytest.mark.parametrize("network", ["voc/deeplabv3-resnet50-lwe", "voc/deeplabv3-resnet50-mwe"])
def test_all_weights_but_depthwise_ones_are_normalized(network: str) -> None:
    assert load_recipe(network).surgery["standardize"] in ("on", True)
