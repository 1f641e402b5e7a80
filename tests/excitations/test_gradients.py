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


def weight_and(recipe: list[dict[str, dict[str, object]]]) -> tuple[Tensor, Composition]:
    excitation = build_excitation(recipe, WeightLayout(SHAPE), dtype=F64)
    return torch.randn(SHAPE, dtype=F64, requires_grad=True), excitation


@pytest.mark.parametrize(
    "recipe",
    [
        [{"standardize": {}}],
        [{"lwe": {"reduction": 1}}],
        [{"mwe": {"detach_max": False}}],
        [{"standardize": {}}, {"lwe": {"reduction": 1}}],
        [{"standardize": {}}, {"mwe": {"detach_max": False}}],
        [{"standardize": {}}, {"lwe": {"reduction": 1}}, {"mwe": {"detach_max": False}}],
    ],
    ids=lambda recipe: "+".join(name for stage in recipe for name in stage),
)
def test_the_gradient_is_that_of_the_function(recipe: list[dict[str, dict[str, object]]]) -> None:
    weight, excitation = weight_and(recipe)
    parameters = dict(excitation.named_parameters())

    def excited(weight: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(excitation, state, (weight,))

    assert torch.autograd.gradcheck(excited, (weight, *parameters.values()))


def test_a_transposed_grouped_conv_has_the_gradient_of_its_function() -> None:
    layout = WeightLayout((4, 3, 2), groups=2, transposed=True)
    recipe = [{"standardize": {}}, {"lwe": {}}, {"mwe": {"detach_max": False}}]
    excitation = build_excitation(recipe, layout, dtype=F64)
    weight = torch.randn(layout.shape, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(excitation, (weight,))


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


@pytest.mark.parametrize(
    "layout",
    [
        WeightLayout((6, 8, 3, 3)),
        WeightLayout((6, 4, 3), groups=2),
        WeightLayout((6, 8)),
        WeightLayout((6, 1, 1, 1), groups=6),
        WeightLayout((8, 3, 2, 2), groups=2, transposed=True),
    ],
    ids=["conv", "grouped", "linear", "fan-in 1", "transposed"],
)
@pytest.mark.parametrize("detach_max", [True, False])
@pytest.mark.parametrize(
    "names", ["standardize", "lwe", "mwe", "standardize lwe", "lwe mwe", "all"]
)
def test_a_layer_gets_what_the_stages_give_one_by_one(
    names: str, detach_max: bool, layout: WeightLayout
) -> None:
    options: dict[str, dict[str, object]] = {
        "standardize": {},
        "lwe": {"reduction": 2},
        "mwe": {"detach_max": detach_max},
    }
    chosen = list(options) if names == "all" else names.split()
    excitation = build_excitation([{n: options[n]} for n in chosen], layout, dtype=F64)
    weight = torch.randn(layout.shape, dtype=F64, requires_grad=True)
    upstream = torch.randn_like(weight)
    inputs = [weight, *excitation.parameters()]
    found, expected = excitation(weight), excitation.excite(weight)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
