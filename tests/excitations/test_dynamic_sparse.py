"""Dynamic Sparse Training: mask, estimated gradient, guard, and zeros after strip."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import we_surgery as ws
from we_surgery.excitations import DynamicSparse, WeightLayout, build_excitation
from we_surgery.excitations.dynamic_sparse import long_tailed_slope

F64 = torch.float64


def stage_with(thresholds: list[float], kernels: bool = False) -> DynamicSparse:
    stage = DynamicSparse(len(thresholds), kernels, dtype=F64)
    with torch.no_grad():
        stage.threshold.copy_(torch.tensor(thresholds))
    return stage


def test_the_estimate_has_its_golden_values() -> None:
    over = torch.tensor([0, 0.1, 0.4, 0.9, 1, 1.01], dtype=F64)
    expected = torch.tensor([2, 1.6, 0.4, 0.4, 0.4, 0], dtype=F64)
    torch.testing.assert_close(long_tailed_slope(over), expected)
    torch.testing.assert_close(long_tailed_slope(-over), expected)


def test_weights_below_their_filters_threshold_are_zero() -> None:
    weight = torch.tensor([[0.5, -0.2, 0.3], [0.5, -0.2, 0.3]], dtype=F64)
    expected = torch.tensor([[0.5, 0, 0], [0.5, -0.2, 0.3]], dtype=F64)
    assert torch.equal(stage_with([0.3, 0.1])(weight), expected)


def test_the_gradients_are_those_of_the_estimate() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=F64, requires_grad=True)
    stage = stage_with([0.0, 0.3, 0.8, 2.0])
    upstream = torch.randn_like(weight)
    found = torch.autograd.grad(stage(weight), [weight, stage.threshold], upstream)
    over = weight.abs() - stage.threshold.view(-1, 1, 1, 1)
    slope = long_tailed_slope(over.detach())
    mask = (over > 0).double()
    by_weight = upstream * mask + upstream * weight * slope * weight.sign()
    by_threshold = -(upstream * weight * slope).sum((1, 2, 3))
    torch.testing.assert_close(found, (by_weight.detach(), by_threshold.detach()))


def test_whole_kernels_go_by_their_mean_magnitude() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=F64, requires_grad=True)
    stage = stage_with([0.0, 0.6, 0.9, 2.0], kernels=True)
    excited = stage(weight)
    upstream = torch.randn_like(weight)
    found = torch.autograd.grad(excited, [weight, stage.threshold], upstream)
    for j, threshold in enumerate(stage.threshold.tolist()):
        to_threshold = 0.0
        for i in range(3):
            kernel = weight.detach()[j, i]
            over = kernel.abs().mean().item() - threshold
            slope = long_tailed_slope(torch.tensor(over)).item()
            assert torch.equal(excited[j, i], kernel if over > 0 else torch.zeros_like(kernel))
            reached = slope * (upstream[j, i] * kernel).sum()
            expected = upstream[j, i] * (over > 0) + reached * kernel.sign() / 4
            torch.testing.assert_close(found[0][j, i], expected)
            to_threshold -= reached
        torch.testing.assert_close(found[1][j], to_threshold)
    assert 0 < (excited == 0).sum() < weight.numel()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_layer_that_would_lose_all_its_weights_starts_anew(mode: str) -> None:
    weight = torch.randn(3, 4, 2, 2)
    excitation = build_excitation([{"dynamic_sparse": {}}], WeightLayout((3, 4, 2, 2)))
    getattr(excitation, mode)()
    with torch.no_grad():
        excitation.dynamic_sparse.threshold.fill_(9.0)
    assert torch.equal(excitation(weight.requires_grad_()), weight)
    assert excitation.dynamic_sparse.threshold.unique().item() == (0 if mode == "train" else 9)


@pytest.mark.parametrize("way", ["checkpoint", "twice", "looked at"])
def test_a_weight_may_be_computed_more_than_once_before_the_backward_pass(way: str) -> None:
    torch.manual_seed(0)
    model = ws.convert(nn.Sequential(nn.Conv2d(4, 6, 3)), config={"conv": "dynamic_sparse"})
    x = torch.randn(2, 4, 6, 6)
    if way == "checkpoint":
        loss = checkpoint(model, x, use_reentrant=False).sum()
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "twice"):
            loss = model(x).sum()
            if way == "looked at":
                with torch.no_grad():
                    model[0].weight.mean()
            loss = loss + model(2 * x).sum()
    loss.backward()
    assert model[0].excitation.dynamic_sparse.threshold.grad is not None


def test_the_sparsity_loss_sums_over_a_model() -> None:
    model = ws.convert(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), config={"linear": "dynamic_sparse"}
    )
    assert ws.sparsity_loss(model).item() == pytest.approx(6)
    ws.sparsity_loss(model).backward()
    assert all((p.grad == -1).all() for n, p in model.named_parameters() if "threshold" in n)
    assert ws.sparsity_loss(nn.Linear(2, 2)).item() == 0


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
            nn.Linear(8 * 16, 4),
        )


@pytest.mark.parametrize("stages", ["dynamic_sparse", "lwe+dynamic_sparse"])
def test_training_makes_weights_that_strip_to_exact_zeros(stages: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 6, 6), torch.randint(4, (16,))
    model = ws.convert(Net(), config={"conv": stages, "linear": "dynamic_sparse"})
    assert ("standardize" in dict(model[0].excitation.named_children())) == ("lwe" in stages)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + 0.1 * ws.sparsity_loss(model)
        loss.backward()
        optimizer.step()
    model.eval()
    stripped = ws.strip(model, example_inputs=x)
    for layer, raw in ((stripped[0], model[0]), (stripped[4], model[4])):
        weight: Tensor = layer.weight
        assert torch.equal(weight, raw.weight)
        assert 0 < (weight == 0).sum() < weight.numel()
    from_file = ws.strip_state_dict(model.state_dict())
    assert torch.equal(from_file["0.weight"], stripped[0].weight)


def test_resnet50_gains_a_threshold_a_filter() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    config = {"conv": "dynamic_sparse", "linear": "skip"}
    assert ws.plan(model, config=config).added_parameters == 26_560
