"""MWE with a scheduled epsilon, against values computed by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import Composition, WeightLayout, build_excitation

F64 = torch.float64
WEIGHT = torch.tensor([[2.0, -4.0, 0.5, 1.0]], dtype=F64)
EPSILONS = {
    "cosine": [1.0, 0.8681980515339463, 0.55, 0.23180194846605358, 0.1, 0.1, 0.1],
    "linear": [1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1],
}


def made(dtype: torch.dtype = F64, **options: Any) -> Composition:
    return build_excitation([{"mwe_scheduled": options}], WeightLayout((1, 4)), dtype=dtype)


def excited(excitation: Composition) -> Tensor:
    return excitation(WEIGHT.clone().requires_grad_()).detach()


def by_hand(epsilon: float) -> Tensor:
    limit = (1 + epsilon) * 4.0
    values = [limit * 0.5 * math.log((1 + w / limit) / (1 - w / limit)) for w in WEIGHT[0].tolist()]
    return torch.tensor([values], dtype=F64)


@pytest.mark.parametrize("shape", EPSILONS)
def test_epsilon_moves_once_in_each_step_and_then_stays(shape: str) -> None:
    excitation = made(steps=4, shape=shape)
    for epsilon in EPSILONS[shape]:
        torch.testing.assert_close(excited(excitation), by_hand(epsilon), rtol=1e-12, atol=0)
        evaluated = excitation.eval()(WEIGHT)
        torch.testing.assert_close(evaluated, by_hand(epsilon), rtol=1e-12, atol=0)
        excitation.train()


def test_a_gradient_is_that_of_its_step_though_later_ones_have_begun() -> None:
    excitation = made(steps=2, shape="linear")
    weight = WEIGHT.clone().requires_grad_()
    steps = [excitation(weight) for _ in range(3)]
    for epsilon, excited_weight in zip((1.0, 0.55, 0.1), steps, strict=True):
        (gradient,) = torch.autograd.grad(excited_weight.sum(), weight)
        pole = ((1 + epsilon) * 4.0) ** 2
        torch.testing.assert_close(gradient, pole / (pole - WEIGHT**2), rtol=1e-12, atol=0)


def test_the_first_step_keeps_preserved_weights() -> None:
    excitation = made(steps=2, epsilon=0.2)
    raw = excitation.preserve(WEIGHT).requires_grad_()
    torch.testing.assert_close(excitation(raw).detach(), WEIGHT, rtol=1e-12, atol=0)
    assert not torch.allclose(excitation(raw).detach(), WEIGHT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "epsilon must lie between"),
        ({"final": 2}, "epsilon must lie between"),
        ({"steps": 0}, "mwe_scheduled: steps must be an integer of at least 1"),
        ({"steps": 2**24}, "mwe_scheduled: steps must be at most 16777215"),
        ({"shape": "step"}, "mwe_scheduled: shape must be one of cosine, linear"),
    ],
)
def test_an_option_out_of_range_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ws.InputError, match=message):
        made(**options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(4, 6)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("form", ["converted", "attached"])
def test_a_run_resumes_in_the_middle_of_the_schedule_to_the_bit(form: str) -> None:
    config = {"linear": "mwe_scheduled", "mwe_scheduled": {"steps": 6}}

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        if form == "converted":
            model = ws.convert(model, config=config)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if form == "attached":
            ws.attach(model, optimizer, config=config)
        return model, optimizer

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = [step(model, optimizer, seed) for seed in range(3, 6)]
    model, optimizer = make()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert [step(model, optimizer, seed) for seed in range(3, 6)] == expected
