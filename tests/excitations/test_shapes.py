"""Each kind of layer: the weight keeps its shape, and each filter is treated by itself."""

import pytest
import torch
from torch import Tensor, nn

from we_surgery.excitations import LWE, MWE, Standardize, WeightLayout, build_excitation
from we_surgery.excitations.layout import from_filters, to_filters

Spec = tuple[type[nn.Module], int, int, int | tuple[int, ...], int]
Stages = list[dict[str, dict[str, int]]]

LAYERS: list[Spec] = [
    (nn.Linear, 6, 5, (), 1),
    (nn.Conv1d, 6, 8, 5, 1),
    (nn.Conv1d, 6, 8, 5, 2),
    (nn.Conv2d, 6, 8, 1, 1),
    (nn.Conv2d, 6, 9, 3, 3),
    (nn.Conv2d, 6, 8, (1, 7), 1),
    (nn.Conv2d, 6, 8, (7, 1), 1),
    (nn.Conv3d, 3, 8, (3, 7, 7), 1),
    (nn.Conv3d, 4, 8, (3, 1, 1), 1),
    (nn.Conv3d, 4, 8, (1, 3, 3), 2),
]
TRANSPOSED: list[Spec] = [
    (nn.ConvTranspose1d, 6, 8, 3, 1),
    (nn.ConvTranspose2d, 6, 8, 3, 1),
    (nn.ConvTranspose2d, 6, 8, (1, 5), 2),
    (nn.ConvTranspose3d, 6, 9, (3, 1, 2), 3),
    (nn.ConvTranspose2d, 6, 6, 3, 6),
]
STAGES = [
    [{"standardize": {}}],
    [{"lwe": {}}],
    [{"mwe": {}}],
    [{"standardize": {}}, {"lwe": {"reduction": 2}}],
    [{"standardize": {}}, {"lwe": {}}, {"mwe": {}}],
]


def make(spec: Spec) -> tuple[Tensor, WeightLayout]:
    kind, *sizes, groups = spec
    layer = kind(*sizes[:2]) if kind is nn.Linear else kind(*sizes, groups=groups)
    transposed = "Transpose" in kind.__name__
    return layer.weight.detach(), WeightLayout(tuple(layer.weight.shape), groups, transposed)


def name_of(value: Spec | Stages) -> str:
    if isinstance(value, tuple):
        return f"{value[0].__name__}-{value[3]}-g{value[4]}"
    return "+".join(name for stage in value for name in stage)


@pytest.mark.parametrize(
    ("stages", "spec"),
    [
        *((stages, spec) for stages in STAGES for spec in (LAYERS[0], LAYERS[4])),
        *((STAGES[-1], spec) for spec in LAYERS + TRANSPOSED),
    ],
    ids=name_of,
)
def test_the_excited_weight_keeps_shape_and_dtype_and_trains(spec: Spec, stages: Stages) -> None:
    raw, layout = make(spec)
    excitation = build_excitation(stages, layout)
    raw.requires_grad_()
    excited = excitation(raw)
    assert excited.shape == raw.shape
    assert excited.dtype == raw.dtype
    (excited * torch.randn_like(excited)).sum().backward()
    assert raw.grad is not None
    assert raw.grad.abs().sum() > 0
    assert all(p.grad is not None for p in excitation.parameters())


@pytest.mark.parametrize("spec", LAYERS, ids=name_of)
def test_the_location_map_averages_the_whole_kernel_and_has_a_value_a_location(
    spec: Spec,
) -> None:
    weight, layout = make(spec)
    lwe = build_excitation([{"lwe": {}}], layout).stages[0]
    multiplier = lwe.multiplier(weight)
    assert multiplier.shape == (layout.out_channels, layout.channels)
    averaged = weight.flatten(2).mean(2) if weight.ndim > 2 else weight
    by_hand = torch.sigmoid(lwe.fc2(torch.relu(lwe.fc1(averaged))))
    torch.testing.assert_close(multiplier, by_hand)
    flat = by_hand.reshape(*by_hand.shape, *[1] * (weight.ndim - 2))
    torch.testing.assert_close(lwe(weight), weight * flat)


@pytest.mark.parametrize("spec", LAYERS, ids=name_of)
def test_each_filter_is_standardized_by_its_unbiased_deviation(spec: Spec) -> None:
    weight, _ = make(spec)
    for found, one in zip(Standardize()(weight), weight, strict=True):
        torch.testing.assert_close(found, (one - one.mean()) / (one.std() + 1e-5))


@pytest.mark.parametrize("spec", LAYERS, ids=name_of)
def test_the_maximum_of_mwe_is_taken_over_the_whole_layer(spec: Spec) -> None:
    weight, _ = make(spec)
    limit = 1.1 * weight.abs().max()
    expected = limit * 0.5 * torch.log((1 + weight / limit) / (1 - weight / limit))
    torch.testing.assert_close(MWE()(weight), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("in_channels", "groups", "reduction", "hidden"),
    [(64, 1, 16, 4), (3, 1, 16, 1), (128, 32, 16, 8), (24, 1, 16, 1), (64, 2, 8, 8), (5, 1, 1, 5)],
)
def test_the_hidden_width_comes_from_the_full_in_channels(
    in_channels: int, groups: int, reduction: int, hidden: int
) -> None:
    lwe = LWE(in_channels, groups, reduction)
    channels = in_channels // groups
    assert lwe.fc1.weight.shape == (hidden, channels)
    assert lwe.fc2.weight.shape == (channels, hidden)
    count = sum(parameter.numel() for parameter in lwe.parameters())
    assert count == 2 * channels * hidden + channels + hidden


def regrouped_by_hand(weight: Tensor, groups: int) -> list[Tensor]:
    """The filters of a transposed conv, one by one: for group q and its output o, column o."""
    inputs = weight.shape[0] // groups
    return [
        weight[group * inputs : (group + 1) * inputs, output]
        for group in range(groups)
        for output in range(weight.shape[1])
    ]


@pytest.mark.parametrize("spec", TRANSPOSED, ids=name_of)
def test_regrouping_gives_the_filters_and_back(spec: Spec) -> None:
    weight, layout = make(spec)
    filters = to_filters(weight, layout.groups)
    assert filters.shape == (layout.out_channels, layout.channels, *layout.kernel_size)
    assert torch.equal(filters, torch.stack(regrouped_by_hand(weight, layout.groups)))
    assert torch.equal(from_filters(filters, layout.groups), weight)


@pytest.mark.parametrize("stages", STAGES, ids=name_of)
@pytest.mark.parametrize("spec", TRANSPOSED, ids=name_of)
def test_a_transposed_conv_is_excited_per_output_filter(spec: Spec, stages: Stages) -> None:
    weight, layout = make(spec)
    excitation = build_excitation(stages, layout)
    filters = torch.stack(regrouped_by_hand(weight, layout.groups))
    for stage in excitation.stages:
        filters = stage(filters)
    found = torch.stack(regrouped_by_hand(excitation(weight), layout.groups))
    torch.testing.assert_close(found, filters)


def test_the_filters_of_a_transposed_conv_are_those_its_outputs_are_made_of() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    before = layer(torch.ones(1, 4, 5, 5))
    filters = to_filters(layer.weight.detach(), 2)
    filters[3] *= 2
    layer.weight.data = from_filters(filters, 2)
    change = layer(torch.ones(1, 4, 5, 5)) / before
    torch.testing.assert_close(change.mean((0, 2, 3)), torch.tensor([1.0, 1, 1, 2, 1, 1]))
