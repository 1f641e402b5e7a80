"""Precision, degenerate weights, memory formats, autocast."""

import pytest
import torch
from forms import BOTH_FORMS, Form
from torch import Tensor

from we_surgery.excitations import (
    LWE,
    MWE,
    Composition,
    Excitation,
    Standardize,
    WeightLayout,
    build_excitation,
)

STAGES = {
    "standardize": [{"standardize": {}}],
    "lwe": [{"lwe": {"reduction": 2}}],
    "mwe": [{"mwe": {}}],
    "all": [{"standardize": {}}, {"lwe": {"reduction": 2}}, {"mwe": {}}],
}


def build(stages: str, weight: Tensor, groups: int = 1, transposed: bool = False) -> Composition:
    layout = WeightLayout(tuple(weight.shape), groups, transposed)
    return build_excitation(STAGES[stages], layout, dtype=weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_the_smallest_published_epsilon(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype).requires_grad_()
    excited = MWE(1e-3)(weight)
    excited.float().sum().backward()
    assert excited.isfinite().all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("stages", STAGES)
def test_autocast_has_no_influence(stages: str) -> None:
    weight = torch.randn(6, 8, 3, 3, requires_grad=True)
    excitation = build(stages, weight)
    plain = excitation(weight)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = excitation(weight)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)
    upstream = torch.randn_like(weight)
    inputs = [weight, *excitation.parameters()]
    expected = torch.autograd.grad(plain, inputs, upstream)
    found = torch.autograd.grad(under_autocast, inputs, upstream)
    assert all(map(torch.equal, found, expected))


@BOTH_FORMS
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_accuracy(mean: float, form: Form) -> None:
    weight = torch.randn(8, 64, 3, 3) + mean
    exact = Standardize()(weight.double())
    assert (form(Standardize())(weight) - exact).abs().max() < 2e-6


@BOTH_FORMS
@pytest.mark.parametrize("value", [0.0, 0.3, -1000.1])
@pytest.mark.parametrize("fan_in", [9, 27, 576])
def test_a_constant_filter_is_standardized_to_exactly_zero(
    value: float, fan_in: int, form: Form
) -> None:
    weight = torch.full((2, fan_in), value)
    assert torch.equal(form(Standardize())(weight), torch.zeros(2, fan_in))


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 1, 1), (1, 1, 1)])
def test_a_filter_of_one_weight_is_not_standardized(shape: tuple[int, ...], form: Form) -> None:
    weight = torch.randn(shape)
    assert torch.equal(form(Standardize())(weight), weight)


@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 1, 1), (5, 3), (5, 3, 3, 3)])
@pytest.mark.parametrize("stages", STAGES)
def test_zeros_stay_zeros_with_finite_gradients(stages: str, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape, requires_grad=True)
    excitation = build(stages, weight)
    excited = excitation(weight)
    excited.sum().backward()
    assert torch.equal(excited, torch.zeros(shape))
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in excitation.parameters())


@BOTH_FORMS
@pytest.mark.parametrize("value", [1e-45, 1e-39, 1.2e-38, 1e-30, 1e30])
def test_mwe_is_finite_at_both_ends_of_the_range(value: float, form: Form) -> None:
    weight = torch.tensor([[value, -value, value / 2]], requires_grad=True)
    excited = form(MWE(1e-6))(weight)
    (gradient,) = torch.autograd.grad(excited.sum(), weight)
    assert excited.isfinite().all()
    assert gradient.isfinite().all()


@BOTH_FORMS
@pytest.mark.parametrize("value", [1e-8, 1e-6, 1e-3])
def test_mwe_keeps_the_smallest_weights_exact(value: float, form: Form) -> None:
    weight = torch.tensor([[1.0, value]])
    exact = MWE(dtype=torch.float64)(weight.double())
    torch.testing.assert_close(form(MWE())(weight).double()[:, 1], exact[:, 1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("stages", STAGES)
def test_a_weight_without_elements_is_returned(stages: str) -> None:
    weight = torch.empty(0, 8, 3, 3, requires_grad=True)
    layout = WeightLayout((4, 8, 3, 3))
    assert build_excitation(STAGES[stages], layout)(weight).shape == (0, 8, 3, 3)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, True)])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((6, 8, 3, 3), torch.channels_last), ((6, 8, 2, 3, 3), torch.channels_last_3d)],
)
@pytest.mark.parametrize("stages", ["lwe", "all"])
def test_the_memory_format_is_kept(
    stages: str,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    groups: int,
    transposed: bool,
) -> None:
    weight = torch.randn(shape).to(memory_format=memory_format)
    excitation = build(stages, weight, groups, transposed)
    expected = excitation(weight.contiguous())
    for excited in (excitation(weight), excitation.excite(weight)):
        assert excited.stride() == weight.stride()
        torch.testing.assert_close(excited, expected)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_right_inverse_of_mwe_gives_the_weight_back(epsilon: float, dtype: torch.dtype) -> None:
    mwe = MWE(epsilon, dtype=dtype)
    weight = torch.randn(5, 4, 3, 3, dtype=dtype)
    # The curve is as steep as its largest gradient factor.
    factor = (1 + epsilon) ** 2 / ((1 + epsilon) ** 2 - 1)
    tolerance = 4 * factor * torch.finfo(dtype).eps
    torch.testing.assert_close(mwe(mwe.right_inverse(weight)), weight, rtol=0, atol=tolerance)
    torch.testing.assert_close(mwe.right_inverse(mwe(weight)), weight, rtol=0, atol=tolerance)


def test_the_right_inverse_of_zeros_is_zeros() -> None:
    assert torch.equal(MWE().right_inverse(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("stage", [Standardize(), LWE(3)], ids=["standardize", "lwe"])
def test_an_excitation_without_an_inverse_says_so(stage: Excitation) -> None:
    with pytest.raises(NotImplementedError, match=f"{type(stage).__name__} has no inverse"):
        Composition([stage, MWE()]).right_inverse(torch.randn(4, 3))


def test_an_excitation_is_a_parametrization() -> None:
    layer = torch.nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", MWE())
    torch.testing.assert_close(layer.weight, weight)
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, MWE()(original))
