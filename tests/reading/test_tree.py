"""Facts that the module tree alone tells."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, ConvNormAct, EcaModule, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation
from toys import Shift, SqueezeExcite

from we_surgery.excitations import WeightLayout
from we_surgery.reading import LayerFacts, converted_obstacle_of, obstacle_of, read_tree
from we_surgery.reading.kinds import is_gate, is_norm, is_shift, kind_of, standardizes_itself


def facts_of(model: nn.Module) -> dict[str, LayerFacts]:
    return {facts.name: facts for facts in read_tree(model)}


@pytest.mark.parametrize(
    ("make", "kind", "layout"),
    [
        (lambda: nn.Conv1d(4, 6, 3), "conv1d", WeightLayout((6, 4, 3))),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), "conv2d", WeightLayout((6, 2, 3, 3), 2)),
        (lambda: nn.Conv3d(4, 6, (1, 2, 3)), "conv3d", WeightLayout((6, 4, 1, 2, 3))),
        (
            lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
            "conv_transpose2d",
            WeightLayout((4, 3, 3, 3), 2, True),
        ),
        (lambda: nn.Linear(4, 6), "linear", WeightLayout((6, 4))),
        (lambda: StdConv2d(4, 6, 3), "conv2d", WeightLayout((6, 4, 3, 3))),
        (lambda: nn.LSTM(4, 6), None, None),
        (lambda: nn.Embedding(4, 6), None, None),
        (lambda: nn.Bilinear(4, 4, 6), None, None),
    ],
)
def test_each_weighted_layer_has_its_kind_and_layout(
    make: Callable[[], nn.Module], kind: str | None, layout: WeightLayout | None
) -> None:
    layer = make()
    assert kind_of(layer) == kind
    facts = read_tree(layer)
    assert [(f.kind, f.layout) for f in facts] == ([] if kind is None else [(kind, layout)])


@pytest.mark.parametrize(
    ("shape", "groups", "transposed", "expected"),
    [
        ((6, 4, 3, 3), 1, False, (4, 6, 4, (3, 3), 36)),
        ((6, 2, 3), 2, False, (4, 6, 2, (3,), 6)),
        ((4, 3, 3, 3), 2, True, (4, 6, 2, (3, 3), 18)),
        ((6, 4), 1, False, (4, 6, 4, (), 4)),
    ],
)
def test_a_layout_tells_channels_and_fan_in(
    shape: tuple[int, ...], groups: int, transposed: bool, expected: tuple[object, ...]
) -> None:
    layout = WeightLayout(shape, groups, transposed)
    found = (layout.in_channels, layout.out_channels, layout.channels)
    assert (*found, layout.kernel_size, layout.fan_in) == expected


@pytest.mark.parametrize(
    ("make", "depthwise"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=4), True),
        (lambda: nn.Conv2d(4, 8, 3, groups=4), True),
        (lambda: nn.Conv2d(1, 8, 3), True),
        (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), True),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), False),
        (lambda: nn.Linear(1, 8), False),
    ],
)
def test_a_conv_whose_filters_see_one_channel_is_known(
    make: Callable[[], nn.Module], depthwise: bool
) -> None:
    assert read_tree(make())[0].has_single_channel_groups == depthwise


def test_attention_has_a_row_for_each_projection() -> None:
    same, other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert list(facts_of(nn.ModuleDict({"a": same}))) == ["a.in_proj_weight", "a.out_proj"]
    shapes = {name: facts.layout.shape for name, facts in facts_of(other).items()}
    assert shapes == {
        "q_proj_weight": (8, 8),
        "k_proj_weight": (8, 6),
        "v_proj_weight": (8, 4),
        "out_proj": (8, 8),
    }


@pytest.mark.parametrize(
    ("module", "gate"),
    [
        (SqueezeExcite(8), True),
        (SqueezeExcitation(8, 4), True),
        (EcaModule(8), True),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()), False),
        (nn.AdaptiveAvgPool2d(1), False),
    ],
)
def test_gates_are_known_by_their_class(module: nn.Module, gate: bool) -> None:
    assert is_gate(module) == gate


def test_all_layers_inside_a_gate_are_marked_with_it() -> None:
    facts = facts_of(nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcite(8)))
    assert {name: f.gate for name, f in facts.items()} == {
        "0": None,
        "1.reduce": "SqueezeExcite at '1'",
        "1.expand": "SqueezeExcite at '1'",
    }


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.LayerNorm(4), True),
        (nn.RMSNorm(4), True),
        (BatchNormAct2d(4), True),
        (FrozenBatchNorm2d(4), False),
        (nn.LocalResponseNorm(2), False),
        (ConvNormAct(4, 4), False),
        (nn.ReLU(), False),
    ],
)
def test_norms_are_told_from_what_is_only_called_so(module: nn.Module, norm: bool) -> None:
    assert is_norm(module) == norm


@pytest.mark.parametrize(
    ("make", "itself"),
    [
        (lambda: StdConv2d(4, 4, 3), True),
        (lambda: ScaledStdConv2d(4, 4, 3), True),
        (lambda: nn.Conv2d(4, 4, 3), False),
    ],
)
def test_classes_that_standardize_their_weight_are_known(
    make: Callable[[], nn.Module], itself: bool
) -> None:
    assert standardizes_itself(make()) == itself
    assert read_tree(make())[0].standardizes_itself == itself


class Shift3x3(nn.Module):
    """A shift without a weight, known by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class Block(nn.Module):
    """Two convs and a shortcut, as TSM wraps them whole in its in-place variant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("model", "shifted"),
    [
        (lambda: nn.Sequential(Shift(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1)), ["0.net"]),
        (lambda: nn.Sequential(Shift(Block()), nn.Conv2d(4, 4, 1)), ["0.net.conv1"]),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Shift3x3(), nn.Conv2d(4, 4, 1)), ["2"]),
        (lambda: Shift(nn.Conv2d(4, 4, 1)), ["net"]),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), []),
        (lambda: nn.Sequential(Shift(nn.Identity()), nn.Conv2d(4, 4, 1)), []),
    ],
    ids=["conv", "block", "before", "whole", "none", "no layer"],
)
def test_shift_fed_layers_are_known_by_the_class_that_feeds_them(
    model: Callable[[], nn.Module], shifted: list[str]
) -> None:
    facts = facts_of(model())
    assert [name for name, f in facts.items() if f.shift is not None] == shifted


def test_a_shift_is_known_by_the_attributes_of_tsm() -> None:
    assert is_shift(Shift(nn.Identity()))
    assert not is_shift(nn.Identity())


def test_a_norm_registered_next_stands_for_the_next_one_called() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Linear(4, 4))
    facts = facts_of(model)
    assert facts["0.0"].followed_by_norm is True
    assert facts["0.0"].norm_evidence == "'1' is registered after it"
    assert facts["2"].followed_by_norm is None


def test_a_norm_with_modules_of_its_own_is_one_norm() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

    facts = facts_of(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 4, 3)))
    assert [facts[name].followed_by_norm for name in ("0", "2")] == [True, None]


def test_the_norm_that_begins_the_next_block_is_not_taken_for_one_of_this_block() -> None:
    blocks = (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)) for _ in range(2))
    facts = facts_of(nn.Sequential(*blocks))
    assert [facts[name].followed_by_norm for name in ("0.1", "1.1")] == [None, None]


def test_names_of_tied_and_shared_layers_are_told() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    model[1].weight = shared.weight
    facts = facts_of(model)
    assert list(facts) == ["0", "1"]
    assert facts["0"].tied_modules == ("0.weight", "1.weight")


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_frozen_weight_is_known(requires_grad: bool) -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(requires_grad)
    assert read_tree(layer)[0].frozen != requires_grad


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_a_weight_that_a_container_owns_is_left_alone(container: type[nn.Module]) -> None:
    owner = container()
    owner.kernel = nn.Parameter(torch.randn(4, 4))
    reason = "would run an excitation as one of its layers"
    assert reason in str(converted_obstacle_of(owner, "kernel"))
    assert obstacle_of(owner, "kernel") is None
