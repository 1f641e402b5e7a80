"""One Parameter, one excitation: tied weights stay tied, and strip without a difference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import EVERYTHING, is_vanilla

import we_surgery as ws
from we_surgery.converted.layer import excited_layers


class Tied(nn.Module):
    """Two layers over one Parameter."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def linears() -> Tied:
    return Tied(nn.Linear(6, 6), nn.Linear(6, 6))


def convs() -> Tied:
    return Tied(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, padding=1, bias=False))


PAIRS: dict[str, tuple[Callable[[], Tied], tuple[int, ...]]] = {
    "linears": (linears, (4, 6)),
    "convs": (convs, (2, 6, 7, 7)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_tied_layers_share_one_excitation_and_stay_tied(pair: str, inplace: bool) -> None:
    make, shape = PAIRS[pair]
    vanilla, x = make(), torch.randn(shape)
    keys = list(vanilla.state_dict())
    converted = ws.convert(vanilla, config=EVERYTHING, inplace=inplace)
    assert converted.first.raw_weight is converted.second.raw_weight
    assert converted.first.excitation is converted.second.excitation
    expected = converted(x)
    stripped, report = ws.strip_with_report(converted, example_inputs=x, inplace=inplace)
    assert report.output_difference == 0
    assert stripped.first.weight is stripped.second.weight
    assert torch.equal(stripped(x), expected)
    assert list(stripped.state_dict()) == keys


def test_tied_layers_are_still_one_parameter_to_the_optimizer() -> None:
    converted = ws.convert(linears(), config=EVERYTHING)
    names = [name for name, _ in converted.named_parameters() if "raw" in name]
    assert names == ["first.raw_weight"]
    x = torch.randn(4, 6)
    optimizer = torch.optim.SGD(converted.parameters(), 0.1)
    converted(x).square().sum().backward()
    optimizer.step()
    stripped = ws.strip(converted, example_inputs=x)
    assert torch.equal(stripped.second.weight, stripped.first.weight)


def test_the_plan_counts_a_shared_excitation_once_and_says_who_shares_it() -> None:
    first, second = ws.plan(linears(), config=EVERYTHING).decisions
    assert first.shared_with is None
    assert second.shared_with == "first"
    assert "shares its excitation with tied 'first'" in second.reason
    assert first.added_parameters > 0
    assert second.added_parameters == 0


def test_an_embedding_tied_to_a_linear_layer_leaves_both_alone() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False))
    model[2].weight = model[0].weight
    plan = ws.plan(model)
    assert [row.stages for row in plan.decisions] == [("mwe",), ()]
    assert "is tied to '0.weight', which is not a conv or linear weight" in plan.decisions[1].reason
    converted = ws.convert(model)
    assert converted[2].weight is converted[0].weight
    x = torch.tensor([[1, 2, 3]])
    assert ws.strip_with_report(converted, example_inputs=x)[1].output_difference == 0


def test_a_conv_tied_to_a_transposed_conv_leaves_both_alone() -> None:
    vanilla = Tied(nn.Conv2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3))
    plan = ws.plan(vanilla, config=EVERYTHING)
    assert not plan.excited
    assert all("tied to" in row.reason and "left alone" in row.reason for row in plan.decisions)
    assert is_vanilla(ws.convert(vanilla, plan=plan))


def test_tied_layers_that_rules_treat_differently_are_left_alone() -> None:
    plan = ws.plan(linears(), rules=[ws.Rule("first", "skip")])
    assert not plan.excited
    for row in plan.decisions:
        assert "decisions differ (skip as linear and MWE as linear): left alone" in row.reason


def test_tied_layers_that_are_all_skipped_keep_their_own_reasons() -> None:
    rows = ws.plan(linears(), rules=[ws.Rule("*", "skip")]).decisions
    assert [row.reason for row in rows] == ["rule '*'", "rule '*'"]


def test_a_parameter_that_is_registered_twice_in_one_module_is_left_alone() -> None:
    layer = nn.Linear(4, 4)
    layer.twin = layer.weight
    (row,) = ws.plan(layer).decisions
    assert not row.excitation
    assert "is tied to 'twin'" in row.reason


def test_a_layer_that_a_model_registers_twice_is_one_layer() -> None:
    layer = nn.Linear(6, 6)
    vanilla = nn.Sequential(layer, nn.ReLU(), layer)
    converted = ws.convert(vanilla, config=EVERYTHING)
    assert converted[0] is converted[2]
    assert [name for name, _ in excited_layers(converted)] == ["0"]
    x = torch.randn(3, 6)
    stripped, report = ws.strip_with_report(converted, example_inputs=x)
    assert report.output_difference == 0
    assert report.layers == 1
    assert stripped[0] is stripped[2]
    assert list(stripped.state_dict()) == list(vanilla.state_dict())


def test_layers_tied_after_the_conversion_under_two_excitations_are_found_by_strip() -> None:
    converted = ws.convert(nn.Sequential(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)))
    converted[1].raw_weight = converted[0].raw_weight
    with pytest.raises(ws.SurgeryError, match="layer '1' is not bit-equal"):
        ws.strip(converted)
    assert not is_vanilla(converted)


def test_a_vanilla_layer_tied_to_a_raw_weight_is_found_by_strip() -> None:
    converted = ws.convert(nn.Sequential(nn.Linear(6, 6), nn.Embedding(6, 6)))
    converted[1].weight = converted[0].raw_weight
    with pytest.raises(ws.SurgeryError, match=r"'1.weight' was tied to the raw weight of '0'"):
        ws.strip(converted, inplace=True)
    assert not is_vanilla(converted)


def test_parameters_that_are_views_of_one_memory_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    block = torch.randn(2, 4, 4)
    model[0].weight.data, model[1].weight.data = block[0], block[1]
    rows = ws.plan(model).decisions
    assert [bool(row.excitation) for row in rows] == [False, False, True]
    assert "shares memory with '1.weight'" in rows[0].reason
