"""Other train-time maps that fold, against float64 references written from their papers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import EXCITATIONS, Excitation, WeightLayout

F64 = torch.float64


def randomized(name: str, layout: WeightLayout, **options: object) -> Excitation:
    """The stage in float64 with parameters drawn at random."""
    torch.manual_seed(0)
    stage = EXCITATIONS[name].for_layout(layout, device=None, dtype=F64, **options)
    for parameter in stage.parameters():
        nn.init.normal_(parameter)
    return stage


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_do_conv_is_a_depthwise_conv_whose_maps_the_conv_combines(groups: int) -> None:
    """The paper's feature composition: K numbers of each channel's patch first, then W."""
    layout = WeightLayout((8, 4 // groups, 3, 2), groups=groups)
    stage = randomized("do_conv", layout)
    weight = torch.randn(layout.shape, dtype=F64)
    x = torch.randn(2, 4, 5, 6, dtype=F64)
    found = F.conv2d(x, stage(weight), groups=groups)

    over = np.eye(6) + stage.residual.detach().numpy()  # [C, positions, depth multiplier]
    w, image = weight.flatten(2).numpy(), x.numpy()
    expected = np.zeros(found.shape)
    for n, o, top, left in np.ndindex(*expected.shape):
        for i in range(4 // groups):
            channel = o // (8 // groups) * (4 // groups) + i
            patch = image[n, channel, top : top + 3, left : left + 2].reshape(6)
            for s in range(6):
                depthwise = sum(over[channel, m, s] * patch[m] for m in range(6))
                expected[n, o, top, left] += w[o, i, s] * depthwise
    torch.testing.assert_close(found.detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_do_conv_by_hand() -> None:
    stage = EXCITATIONS["do_conv"].for_layout(WeightLayout((1, 1, 2)), device=None, dtype=F64)
    with torch.no_grad():
        stage.residual.copy_(torch.tensor([[[1.0, 3.0], [0.5, -2.0]]]))
    # D = [[2, 3], [0.5, -1]], and D (5, 7) = (31, -4.5).
    found = stage(torch.tensor([[[5.0, 7.0]]], dtype=F64))
    assert found.flatten().tolist() == [31.0, -4.5]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2, bias=False), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 1, bias=False), (2, 4, 5)),
    ],
    ids=["strided", "grouped", "depthwise", "1x1"],
)
def test_expand_is_three_convs_one_after_the_other(layer: nn.Conv2d, shape: tuple[int]) -> None:
    rate, groups = 3, layer.groups
    layout = WeightLayout(tuple(layer.weight.shape), groups=groups)
    stage = randomized("expand", layout, rate=rate)
    weight, x = layer.weight.detach().double(), torch.randn(shape, dtype=F64)
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    found = conv(x, stage(weight), groups=groups, **where)

    outputs, channels, *kernel = weight.shape
    by_group = []
    for g, own in enumerate(weight.chunk(groups)):
        core = torch.zeros(outputs // groups * rate, channels * rate, *kernel, dtype=F64)
        core[: outputs // groups, :channels] = own
        core[: outputs // groups, channels:] = stage.beside[g]
        core[outputs // groups :] = stage.below[g]
        by_group.append(core)
    one = (1,) * len(kernel)
    before = stage.before.flatten(0, 1).unflatten(1, (channels, *one))
    after = stage.after.flatten(0, 1).unflatten(1, (outputs // groups * rate, *one))
    maps = conv(x, before, groups=groups)
    maps = conv(maps, torch.cat(by_group), groups=groups, **where)
    torch.testing.assert_close(found, conv(maps, after, groups=groups), rtol=1e-10, atol=1e-10)


def standardized_by_the_text(weight: Tensor, gain: Tensor, gamma: float) -> Tensor:
    """gamma g (W - mean) / sqrt(N var), mean and variance over the fan-in of a filter."""
    expected = np.empty(weight.shape)
    for j, one in enumerate(weight.numpy()):
        mean = sum(one.flat) / one.size
        variance = sum((value - mean) ** 2 for value in one.flat) / one.size
        expected[j] = gamma * gain[j].item() * (one - mean) / math.sqrt(one.size * variance)
    return torch.from_numpy(expected)


@pytest.mark.parametrize("gamma", [1.0, 1.7139588594436646])
def test_scaled_standardization_by_the_text_and_by_timm(gamma: float) -> None:
    layout = WeightLayout((6, 5, 3, 3))
    stage = randomized("scaled_standardize", layout, gamma=gamma)
    weight = torch.randn(layout.shape, dtype=F64) * 7 + 3
    found = stage(weight).detach()
    gain = stage.gain.detach()
    torch.testing.assert_close(
        found, standardized_by_the_text(weight, gain, gamma), rtol=1e-5, atol=1e-8
    )
    theirs = ScaledStdConv2d(5, 6, 3, padding=0, gamma=gamma, bias=False, dtype=F64)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        theirs.gain.copy_(gain.view(-1, 1, 1, 1))
    x = torch.randn(2, 5, 4, 4, dtype=F64)
    torch.testing.assert_close(F.conv2d(x, found), theirs(x).detach(), rtol=1e-5, atol=1e-5)


def test_asr_multiplies_channels_by_attention_to_a_learned_vector() -> None:
    layout = WeightLayout((64, 5, 3, 3))
    stage = randomized("gain", layout, attention="se")
    assert stage.fc1.out_features == 4
    fresh = EXCITATIONS["gain"].for_layout(layout, device=None, dtype=None, attention="se")
    assert fresh.input.tolist() == pytest.approx([0.1] * 64)
    weight, x = torch.randn(layout.shape, dtype=F64), torch.randn(2, 5, 6, 6, dtype=F64)
    vector, first, a, second, b = (p.detach().numpy() for p in stage.parameters())
    hidden = [max(row @ vector + bias, 0.0) for row, bias in zip(first, a, strict=True)]
    assert min(hidden) == 0 < max(hidden)
    attention = [
        1 / (1 + math.exp(-(row @ hidden + bias))) for row, bias in zip(second, b, strict=True)
    ]
    expected = F.conv2d(x, weight) * torch.tensor(attention, dtype=F64).view(-1, 1, 1)
    torch.testing.assert_close(F.conv2d(x, stage(weight)).detach(), expected)


def test_a_gain_starts_at_one_and_is_one_number_per_filter() -> None:
    model = ws.convert(nn.ConvTranspose2d(4, 6, 3), config={"conv": "gain"})
    before = model.weight.clone()
    assert torch.equal(before, model.raw_weight)
    with torch.no_grad():
        model.excitation.gain.gain[2] = 3
    assert torch.equal(model.weight[:, 2], 3 * before[:, 2])
    assert torch.equal(model.weight[:, :2], before[:, :2])


def test_the_compander_by_its_curve() -> None:
    stage = EXCITATIONS["weight_compander"].for_layout(
        WeightLayout((3, 4)), device=None, dtype=F64, a=0.8, b=0.3
    )
    weight = torch.randn(3, 4, dtype=F64)
    found = stage(weight)
    for value, one in zip(found.flatten().tolist(), weight.flatten().tolist(), strict=True):
        assert value == pytest.approx(0.8 * math.atan(one / 0.3), rel=1e-12)
    assert found.abs().max() < 0.4 * math.pi
    torch.testing.assert_close(stage.right_inverse(found), weight)
    with pytest.raises(ws.InputError, match=r"the limit is 1\.257"):
        stage.right_inverse(torch.full((3, 4), 1.3, dtype=F64))


def test_the_compander_takes_its_scales_from_the_layer() -> None:
    layer = nn.Linear(6, 4)
    model = ws.convert(layer, config={"linear": "weight_compander"})
    largest = layer.weight.abs().max()
    torch.testing.assert_close(model.excitation.weight_compander.log_a.exp()[0], largest)
    torch.testing.assert_close(model.weight, largest * torch.atan(2 * layer.weight / largest))
    kept = ws.convert(layer, config={"linear": "weight_compander"}, init="preserve")
    torch.testing.assert_close(kept.weight, layer.weight, rtol=1e-5, atol=1e-7)


def test_a_weight_of_zeros_is_companded_to_zeros() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    model = ws.convert(layer, config={"linear": "weight_compander"})
    model(torch.ones(1, 3)).sum().backward()
    assert not model.weight.any()
    assert model.raw_weight.grad.isfinite().all()


def test_convs_of_one_position_are_left_alone_by_do_conv() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6))
    plan = ws.plan(model, config={"conv": "do_conv", "depthwise": "do_conv"})
    assert [row.stages for row in plan.decisions] == [(), ("do_conv",)]
    assert "has kernels of one position" in plan.decisions[0].reason


@pytest.mark.parametrize(
    "stages", ["expand+do_conv+standardize+gain+mwe", "do_conv+weight_compander"]
)
def test_they_compose_preserve_and_fold(stages: str) -> None:
    torch.manual_seed(0)
    vanilla, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 4, 6, 6)
    model = ws.convert(vanilla, config={"conv": stages}, init="preserve", example_inputs=x)
    torch.testing.assert_close(model(x), vanilla(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(ws.param_groups(model), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    assert torch.equal(ws.strip(model)(x), model(x))
