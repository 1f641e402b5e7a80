"""Projections on l1 and l2,1 balls, of raw weights where layers are excited."""

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws

F64 = torch.float64


def nearest_l1(values: Tensor, radius: float) -> Tensor:
    """By bisection of the threshold, and not by sorting."""
    low, high = 0.0, float(values.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        total = (values.abs() - middle).clamp_min(0).sum()
        low, high = (middle, high) if total > radius else (low, middle)
    return values.sign() * (values.abs() - high).clamp_min(0)


def layer(cls: type[nn.Module] = nn.Conv2d, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return cls(4, 6, 3, dtype=F64, **options)


def test_golden_values() -> None:
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert ws.project(linear, "l21", 5.0) == 1  # lengths 5 and 1 become 4.5 and 0.5
    torch.testing.assert_close(linear.weight.data, torch.tensor([[2.7, 3.6], [0.0, 0.5]]))
    assert ws.project(linear, "l21", 5.1) == 0


def test_l1_is_the_nearest_point_of_the_ball() -> None:
    conv = layer()
    expected = nearest_l1(conv.weight.detach(), 3.0)
    assert ws.project(conv, "l1", 3.0) == 1
    torch.testing.assert_close(conv.weight.detach(), expected)
    assert (conv.weight == 0).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_l21_shortens_whole_filters(transposed: bool) -> None:
    conv = layer(nn.ConvTranspose2d, groups=2) if transposed else layer()
    before = conv.weight.detach().clone()
    ws.project(conv, "l21", 1.0)

    def filters(weight: Tensor) -> Tensor:
        if not transposed:
            return weight.flatten(1)
        halves = weight.reshape(2, 2, 3, 3, 3).transpose(1, 2)  # groups, filters, channels
        return halves.reshape(6, -1)

    old, new = filters(before), filters(conv.weight.detach())
    lengths = nearest_l1(old.norm(dim=1), 1.0)
    torch.testing.assert_close(new, old * (lengths / old.norm(dim=1))[:, None])


def test_both_forms_project_raw_weights() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(layer(), nn.Flatten(), nn.Linear(96, 2, dtype=F64))

    config = {"mode": "lwe", "standardize": "off", "linear": "skip"}
    x = torch.randn(3, 4, 6, 6, dtype=F64)
    vanilla, model = net(), net()
    torch.manual_seed(1)
    converted = ws.convert(vanilla, config=config)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    excitation = ws.attach(model, optimizer, config=config)
    own = torch.optim.SGD(converted.parameters(), 0.1)
    for step in range(2):
        for each, moved in ((model, optimizer), (converted, own)):
            moved.zero_grad()
            each(x).square().mean().backward()
            moved.step()
        moved_weights = ws.project(excitation, "l21", 1.0)
        assert moved_weights == ws.project(converted, "l21", 1.0)
        assert moved_weights == 2 or step
        torch.testing.assert_close(model[0].weight, converted[0].weight)
        torch.testing.assert_close(model[2].weight, converted[2].weight)
    assert converted[0].raw_weight.flatten(1).norm(dim=1).sum() <= 1 + 1e-9
    with pytest.raises(ws.InputError, match="attached excitation"):
        ws.project(model, "l1", 1.0)


@pytest.mark.parametrize(("norm", "radius"), [("l2", 1.0), ("l1", 0.0)])
def test_what_is_no_ball_is_refused(norm: str, radius: float) -> None:
    with pytest.raises(ws.InputError, match="does not exist"):
        ws.project(nn.Linear(2, 2), norm, radius)
