"""LWE over positions and over heads, against float64 references written from their definitions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import we_surgery as ws
from we_surgery.excitations import LWE, WeightLayout, build_excitation

F64 = torch.float64
UP, DOWN = 0.7310585786300049, 0.2689414213699951  # sigmoid of 1 and of -1


def made(shape: tuple[int, ...], groups: int = 1, **options: Any) -> LWE:
    torch.manual_seed(1)
    layout = WeightLayout(shape, groups)
    stage = build_excitation([{"lwe": options}], layout, dtype=F64).stages[0]
    assert isinstance(stage, LWE)
    return stage


def by_hand(fc1: list[float], **options: Any) -> LWE:
    """With ``fc1`` for its one hidden unit, 1 and -1 behind it, and no biases."""
    stage = made(**options)
    with torch.no_grad():
        stage.fc1.weight.copy_(torch.tensor([fc1]))
        stage.fc2.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        stage.fc1.bias.zero_()
        stage.fc2.bias.zero_()
    return stage


def multipliers(stage: LWE, pooled: np.ndarray) -> list[float]:
    """``sigmoid(B relu(A p + a) + b)``, one number after the other."""
    (a, a0), (b, b0) = (
        (fc.weight.detach().numpy(), fc.bias.detach().numpy()) for fc in (stage.fc1, stage.fc2)
    )
    hidden = [max(sum(a[h] * pooled) + a0[h], 0.0) for h in range(len(a))]
    return [1 / (1 + math.exp(-(sum(b[n] * hidden) + b0[n]))) for n in range(len(b))]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 1, 3, 3), 6), ((5, 4, 2, 3), 1), ((4, 3, 5), 2), ((3, 2, 1, 2, 2), 1)],
)
def test_each_position_of_a_kernel_has_a_multiplier(shape: tuple[int, ...], groups: int) -> None:
    stage = made(shape, groups, attention="position")
    weight = torch.randn(shape, dtype=F64)
    found = stage(weight).detach().numpy().reshape(*shape[:2], -1)
    kernels = weight.numpy().reshape(*shape[:2], -1)
    assert stage.fc1.weight.shape == (kernels.shape[2] // 2, kernels.shape[2])
    for kernel, excited in zip(kernels, found, strict=True):
        pooled = np.array([sum(kernel[:, k]) / shape[1] for k in range(kernels.shape[2])])
        for k, multiplier in enumerate(multipliers(stage, pooled)):
            np.testing.assert_allclose(excited[:, k], kernel[:, k] * multiplier, rtol=1e-12)


def test_a_depthwise_kernel_by_hand() -> None:
    stage = by_hand([0.5, 1.0], shape=(1, 1, 2), attention="position", hidden=1)
    found = stage(torch.tensor([[[1.0, 0.5]]], dtype=F64))
    assert found.flatten().tolist() == pytest.approx([UP, 0.5 * DOWN], abs=1e-15)


def blocks(layer: str, heads: int, size: int) -> list[slice]:
    """The rows of each q, k and v of each head, or a head's columns."""
    count = {"qkv": 3 * heads, "q": heads, "proj": heads}[layer]
    width = size // count
    return [slice(n * width, (n + 1) * width) for n in range(count)]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layer", ["qkv", "q"])
def test_the_rows_of_a_head_share_multipliers(layer: str, heads: int) -> None:
    stage = made((24, 6), attention="heads", heads=heads, layer=layer, reduction=2)
    weight = torch.randn(24, 6, dtype=F64)
    w, found = weight.numpy(), stage(weight).detach().numpy()
    for rows in blocks(layer, heads, 24):
        pooled = np.array([sum(w[rows, i]) / (rows.stop - rows.start) for i in range(6)])
        for i, multiplier in enumerate(multipliers(stage, pooled)):
            np.testing.assert_allclose(found[rows, i], w[rows, i] * multiplier, rtol=1e-12)


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_the_columns_of_a_head_share_multipliers(heads: int) -> None:
    stage = made((5, 12), attention="heads", heads=heads, layer="proj", reduction=4)
    assert stage.fc1.weight.shape == (3, heads)
    weight = torch.randn(5, 12, dtype=F64)
    found = stage(weight).detach().numpy()
    for row, excited in zip(weight.numpy(), found, strict=True):
        columns = blocks("proj", heads, 12)
        pooled = np.array([sum(row[own]) / (12 // heads) for own in columns])
        for own, multiplier in zip(columns, multipliers(stage, pooled), strict=True):
            np.testing.assert_allclose(excited[own], row[own] * multiplier, rtol=1e-12)


def test_a_qkv_weight_by_hand() -> None:
    stage = by_hand([1.0, -1.0], shape=(6, 2), attention="heads", heads=1)
    q, k, v = [[1.0, 3.0], [3.0, -1.0]], [[2.0, 2.0], [4.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]
    found = stage(torch.tensor([*q, *k, *v], dtype=F64)).tolist()
    assert found[0] == pytest.approx([UP, 3 * DOWN], abs=1e-15)
    assert found[1] == pytest.approx([3 * UP, -DOWN], abs=1e-15)
    assert found[2:] == [[1.0, 1.0], [2.0, 2.0], [0.0, 0.5], [0.0, 0.5]]


def test_a_proj_weight_by_hand() -> None:
    stage = by_hand([1.0, -2.0], shape=(1, 4), attention="heads", heads=2, layer="proj")
    (found,) = stage(torch.tensor([[1.0, 3.0, 0.0, 1.0]], dtype=F64)).tolist()
    assert found == pytest.approx([UP, 3 * UP, 0.0, DOWN], abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((10, 8), {"heads": 2}, "3 x 2 heads do not divide the 10 rows of a qkv layer"),
        ((10, 8), {"heads": 3, "layer": "q"}, "lwe: 3 heads do not divide the 10 rows"),
        ((12, 8), {"heads": 3, "layer": "proj"}, "3 heads do not divide the 8 columns of a proj"),
        ((12, 8), {}, "lwe: heads must be an integer of at least 1, not None"),
        ((12, 8), {"heads": 2, "layer": "out"}, "lwe: layer must be one of qkv, q, proj"),
        ((12, 8, 3), {"heads": 2}, "attention heads cannot excite what is a conv"),
        ((12, 8), {"attention": "position"}, "cannot excite what has kernels of one position"),
    ],
)
def test_what_does_not_fit_the_layer_is_an_error(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ws.InputError, match=message) as error:
        made(shape, **{"attention": "heads", **options})
    assert error.value.cure == "Correct the option in the config, rule or plan."


class Mobile(nn.Sequential):
    def __init__(self) -> None:
        depthwise = nn.Conv2d(8, 8, 3, groups=8)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), depthwise, nn.Conv2d(8, 4, 1))


def test_depthwise_convs_get_it_by_a_line_of_the_config() -> None:
    config = {"mode": "lwe", "depthwise": "lwe(attention=position)"}
    rows = {row.layer: row for row in ws.plan(Mobile(), config=config).decisions}
    assert rows["0"].excitation == [{"standardize": {}}, {"lwe": {}}]
    assert rows["2"].excitation == [{"lwe": {"attention": "position"}}]
    assert rows["2"].added_parameters == 2 * 9 * 4 + 9 + 4


@pytest.mark.parametrize(
    "options", [{"attention": "position"}, {"then": {"attention": "position"}}]
)
def test_a_kernel_of_one_position_is_left_out_of_the_plan(options: dict[str, Any]) -> None:
    rows = {row.layer: row for row in ws.plan(Mobile(), config={"lwe": options}).decisions}
    assert rows["0"].stages == ("standardize", "lwe")
    assert not rows["3"].excitation
    assert "not lwe: it has kernels of one position" in rows["3"].reason


def test_the_attention_of_a_transformer_has_the_multipliers_of_its_heads() -> None:
    config = {"linear": "lwe(attention=heads, heads=2, layer=proj)"}
    rule = ws.Rule("*in_proj_weight", options={"lwe": {"layer": "qkv"}})
    plan = ws.plan(nn.MultiheadAttention(8, 2), config=config, rules=[rule])
    added = {row.layer: row.added_parameters for row in plan.decisions}
    assert added == {"in_proj_weight": 2 * 8 * 1 + 8 + 1, "out_proj": 2 * 2 * 1 + 2 + 1}
