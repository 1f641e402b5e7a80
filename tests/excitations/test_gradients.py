"""The backward pass: against finite differences, and against equation 3 where M is held."""

import pytest
import torch
from forms import BOTH_FORMS, Form
from torch import Tensor

from we_surgery.excitations import (
    MWE,
    Composition,
    Standardize,
    WeightLayout,
    build_excitation,
)

F64 = torch.float64
SHAPE = (4, 3, 2, 2)


def weight_and(stages: list[dict[str, dict[str, object]]]) -> tuple[Tensor, Composition]:
    excitation = build_excitation(stages, WeightLayout(SHAPE), dtype=F64)
    return torch.randn(SHAPE, dtype=F64, requires_grad=True), excitation


def equation_3(weight: Tensor, epsilon: float) -> Tensor:
    limit = (1 + epsilon) * weight.abs().max()
    return limit**2 / (limit**2 - weight**2)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.2, 1.0])
def test_detached_mwe_has_the_gradient_of_equation_3(epsilon: float) -> None:
    weight, excitation = weight_and([{"mwe": {"epsilon": epsilon}}])
    upstream = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(excitation(weight), weight, upstream)
    torch.testing.assert_close(gradient, equation_3(weight.detach(), epsilon) * upstream)


def test_detached_mwe_has_the_gradient_of_the_function_with_its_maximum_held() -> None:
    # The largest weight is fixed, so that the function's maximum cannot move.
    moving = (0.9 * torch.rand(11, dtype=F64) - 0.4).requires_grad_()
    largest = torch.tensor([-1.0], dtype=F64)
    mwe = MWE(0.1, dtype=F64)
    assert torch.autograd.gradcheck(lambda rest: mwe(torch.cat([rest, largest])), (moving,))


def test_after_a_gate_equation_3_is_chained_to_the_gates_own_gradient() -> None:
    weight, excitation = weight_and([{"standardize": {}}, {"lwe": {}}, {"mwe": {}}])
    standardize, lwe, _ = excitation.stages
    upstream = torch.randn_like(weight)
    inputs = [weight, *lwe.parameters()]
    found = torch.autograd.grad(excitation(weight), inputs, upstream)
    gated = lwe(standardize(weight))
    chained = equation_3(gated.detach(), 0.1) * upstream
    for one, expected in zip(found, torch.autograd.grad(gated, inputs, chained), strict=True):
        torch.testing.assert_close(one, expected)


def test_the_gradient_through_a_standardization_is_orthogonal_to_the_filter() -> None:
    weight = torch.randn(SHAPE, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad((Standardize(0.0)(weight) ** 3).sum(), weight)
    torch.testing.assert_close(gradient.sum((1, 2, 3)), torch.zeros(4, dtype=F64))
    torch.testing.assert_close((gradient * weight).sum((1, 2, 3)), torch.zeros(4, dtype=F64))


@BOTH_FORMS
def test_no_gradient_goes_through_the_deviation_of_a_constant_filter(form: Form) -> None:
    weight = torch.full((2, 3, 3, 3), 0.3, requires_grad=True)
    upstream = torch.randn(2, 3, 3, 3)
    (gradient,) = torch.autograd.grad(form(Standardize(0.5))(weight), weight, upstream)
    centred = upstream - upstream.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, centred / 0.5)


@BOTH_FORMS
@pytest.mark.parametrize("detach_max", [True, False])
def test_a_weight_of_zeros_has_the_gradient_of_the_identity(detach_max: bool, form: Form) -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    mwe = form(MWE(detach_max=detach_max))
    (gradient,) = torch.autograd.grad(mwe(weight), weight, upstream)
    assert torch.equal(gradient, upstream)
