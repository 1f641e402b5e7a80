"""Excitation of the gradient alone: W computes, and moves by the papers' amplified gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import LWE, WeightLayout, build_excitation

F64 = torch.float64
SHAPE = (6, 5, 3, 3)


def pulled_back(
    stages: list[dict[str, object]], weight: Tensor
) -> tuple[Tensor, Tensor, nn.Module]:
    """The excited weight, its gradient of a fixed upstream one, and the excitation."""
    torch.manual_seed(1)
    excitation = build_excitation(stages, WeightLayout(SHAPE), dtype=weight.dtype)
    raw = weight.clone().requires_grad_()
    excited = excitation(raw)
    excited.backward(upstream(weight))
    assert raw.grad is not None
    return excited.detach(), raw.grad, excitation


def upstream(weight: Tensor) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=weight.dtype)


@pytest.mark.parametrize("epsilon", [0.1, 0.001])
def test_mwe_on_the_gradient_is_eq_3_without_eq_2(epsilon: float) -> None:
    weight = torch.randn(SHAPE, dtype=F64)
    excited, gradient, _ = pulled_back([{"mwe_gradient": {"epsilon": epsilon}}], weight)
    assert torch.equal(excited, weight)
    largest = (1 + epsilon) * max(abs(value) for value in weight.flatten().tolist())
    for found, w, g in zip(
        *(tensor.flatten().tolist() for tensor in (gradient, weight, upstream(weight))), strict=True
    ):
        assert found == pytest.approx(largest**2 / (largest**2 - w**2) * g, rel=1e-12)
    # The same slope that MWE itself has.
    _, whole, _ = pulled_back([{"mwe": {"epsilon": epsilon}}], weight)
    torch.testing.assert_close(gradient, whole)


def test_lwe_on_the_gradient_multiplies_it_by_m() -> None:
    weight = torch.randn(SHAPE, dtype=F64)
    excited, gradient, excitation = pulled_back(
        [{"lwe_gradient": {"lwe": {"reduction": 2}}}], weight
    )
    assert torch.equal(excited, weight)
    fc1, a, fc2, b = (p.detach().clone().requires_grad_() for p in excitation.parameters())
    pooled = weight.mean((2, 3))
    m = torch.sigmoid(torch.relu(pooled @ fc1.T + a) @ fc2.T + b)[:, :, None, None]
    torch.testing.assert_close(gradient, upstream(weight) * m.detach())
    (weight * m).backward(upstream(weight))
    for own, expected in zip(excitation.parameters(), (fc1, a, fc2, b), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
        assert own.grad.any()


def test_attached_without_standardization_it_is_a_hook_on_the_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    own = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, own)]
    ws.attach(own, optimizers[1], config={"linear": "mwe_gradient"})

    def amplify(*_: object) -> None:
        for layer in (plain[0], plain[2]):
            pole = (1.1 * layer.weight.detach().abs().max()).square()
            layer.weight.grad.mul_(pole / (pole - layer.weight.detach().square()))

    optimizers[0].register_step_pre_hook(amplify)
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, optimizer in zip((plain, own), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name


def test_after_a_norm_the_weight_is_the_standardized_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    both = [
        ws.convert(model, config={"conv": stages})[0].weight
        for stages in ("standardize", "mwe_gradient")
    ]
    torch.testing.assert_close(both[0], both[1])
    with pytest.raises(ws.InputError, match="lwe must be a mapping"):
        ws.convert(model, config={"conv": "lwe_gradient", "lwe_gradient": {"lwe": "cbam"}})
    assert LWE.order == ws.EXCITATIONS["lwe_gradient"].order
