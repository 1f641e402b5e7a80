"""The train parameters of the WE paper's Table 1, and further counts of the specification."""

import pytest
import torch
import torchvision

import we_surgery as ws


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        options = {"weights": None}
        if "deeplab" in name:
            options["weights_backbone"] = None
        return torchvision.models.get_model(name, **options)


@pytest.mark.parametrize(
    ("name", "train_parameters"),
    [
        ("mobilenet_v2", 4_106_509),
        ("resnet18", 11_846_178),
        ("resnet50", 28_059_058),
        ("resnext50_32x4d", 27_865_654),
        ("wide_resnet50_2", 72_336_394),
        ("resnet152", 67_318_194),
    ],
)
def test_lwe_has_the_train_parameters_of_table_1(name: str, train_parameters: int) -> None:
    model = build(name)
    vanilla = sum(p.numel() for p in model.parameters())
    converted = ws.convert(model, "lwe", inplace=True)
    assert sum(p.numel() for p in converted.parameters()) == train_parameters
    stripped = ws.strip(converted, inplace=True)
    assert sum(p.numel() for p in stripped.parameters()) == vanilla


@pytest.mark.parametrize(
    ("name", "convs", "added"),
    [("r3d_18", 20, 156_666), ("deeplabv3_resnet50", 61, 5_357_434)],
)
def test_lwe_adds_the_specified_parameters(name: str, convs: int, added: int) -> None:
    plan = ws.plan(build(name), "lwe")
    assert sum("lwe" in row.stages for row in plan.decisions) == convs
    assert plan.added_parameters == added


def test_mobilenet_v2_in_mode_we_gets_35_lwe_and_17_plain_mwe_convs() -> None:
    convs = [row for row in ws.plan(build("mobilenet_v2"), "we").decisions if row.kind == "conv2d"]
    assert [row.stages for row in convs].count(("standardize", "lwe")) == 35
    assert [row.stages for row in convs].count(("mwe",)) == 17
    assert len(convs) == 52


def test_reduction_8_gives_the_specified_count_on_resnet50() -> None:
    plan = ws.plan(build("resnet50"), config={"mode": "lwe", "lwe": {"reduction": 8}})
    assert plan.added_parameters == 4_981_514
