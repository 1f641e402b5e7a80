"""Norm Loss: what it sums over, and what it draws filters to."""

import pytest
import torch
from torch import fx, nn
from toys import ConvNet, Zoo

import we_surgery as ws


def by_hand(*weights: torch.Tensor) -> torch.Tensor:
    return torch.stack([(1 - w.flatten(1).norm(dim=1)).square().sum() for w in weights]).sum()


def test_golden_value() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    assert ws.norm_loss(layer).item() == (1 - 5) ** 2 + 0.5**2
    assert ws.norm_loss(nn.ReLU()).item() == 0.0


def test_it_takes_each_conv_and_linear_weight_that_is_trained_once() -> None:
    model = ConvNet()
    model.depthwise.weight.requires_grad_(False)
    model.twin = nn.Linear(12, 5)
    model.twin.weight = model.head.weight
    expected = by_hand(model.stem.weight, model.grouped.weight, model.head.weight)
    torch.testing.assert_close(ws.norm_loss(model), expected)


def test_of_converted_models_it_takes_excited_or_raw_weights_and_no_excitations() -> None:
    vanilla = ConvNet()
    weights = [layer.weight for layer in (vanilla.stem, vanilla.depthwise, vanilla.grouped)]
    model = ws.convert(vanilla, "lwe")
    layers = (model.stem, model.depthwise, model.grouped, model.head)
    excited = ws.norm_loss(model, of="excited")
    torch.testing.assert_close(excited, by_hand(*(layer.weight for layer in layers)))
    raw = ws.norm_loss(model)
    assert raw < excited  # the stem and the grouped conv are standardized
    torch.testing.assert_close(raw, by_hand(*weights, vanilla.head.weight))
    raw.backward()
    assert model.stem.raw_weight.grad is not None
    assert model.stem.excitation.lwe.fc1.weight.grad is None
    with pytest.raises(ws.InputError, match="got 'rawest'"):
        ws.norm_loss(model, of="rawest")


def test_attention_weights_count_where_they_are_excited() -> None:
    model = ws.convert(Zoo(), "mwe")
    without = ws.convert(Zoo(), "mwe", rules=[ws.Rule("attention.in_proj_weight", "skip")])
    without.load_state_dict(model.state_dict(), strict=False)
    attention = by_hand(model.attention.in_proj_weight)
    expected = ws.norm_loss(without, of="excited") + attention
    torch.testing.assert_close(ws.norm_loss(model, of="excited"), expected)


def test_weights_that_a_graph_reads_are_excited_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    vanilla = fx.symbolic_trace(Functional())
    model = ws.convert(vanilla, "mwe")
    folded = ws.strip(model).weight
    torch.testing.assert_close(ws.norm_loss(model, of="excited"), by_hand(folded))
    torch.testing.assert_close(ws.norm_loss(model), by_hand(vanilla.weight))


def test_filters_of_transposed_convs_are_those_that_make_an_output() -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    filters = [layer.weight[3 * (o // 2) : 3 * (o // 2) + 3, o % 2].flatten() for o in range(4)]
    torch.testing.assert_close(ws.norm_loss(layer), by_hand(torch.stack(filters)))


def test_training_on_it_gives_filters_of_length_one() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        ws.norm_loss(model).backward()
        optimizer.step()
    norms = model.stem.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(8))


def test_an_attached_model_has_excited_weights_alone() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ws.attach(model, optimizer, "lwe")
    weights = [layer.weight for layer in (model.stem, model.depthwise, model.grouped, model.head)]
    torch.testing.assert_close(ws.norm_loss(model, of="excited"), by_hand(*weights))
    with pytest.raises(ws.InputError, match="attached to the optimizer"):
        ws.norm_loss(model)
