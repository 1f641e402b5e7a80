"""The worked examples of the specification, in float64."""

import pytest
import torch
from forms import BOTH_FORMS, Form

from we_surgery.excitations import LWE, MWE, Composition, Standardize

F64 = torch.float64
FILTERS = torch.tensor([[1.0, 3.0], [2.0, -2.0]], dtype=F64).reshape(2, 2, 1, 1)
STANDARDIZED = torch.tensor(
    [[-0.7071017812, 0.7071017812], [0.7071042812, -0.7071042812]], dtype=F64
)
LINE = torch.tensor([[1.0, -0.5, 0.25, 0.1]], dtype=F64)


def golden_lwe() -> LWE:
    lwe = LWE(2, dtype=F64)
    with torch.no_grad():
        lwe.fc1.weight.copy_(torch.tensor([[1.0, 2.0]]))
        lwe.fc2.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        lwe.fc1.bias.zero_()
        lwe.fc2.bias.zero_()
    return lwe


def assert_golden(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-9)


def test_standardization_gives_the_golden_filters() -> None:
    assert_golden(Standardize()(FILTERS), STANDARDIZED)


def test_the_location_map_has_the_golden_multipliers() -> None:
    multiplier = golden_lwe().multiplier(Standardize()(FILTERS))
    expected = torch.tensor([[0.6697604434, 0.3302395566], [0.5, 0.5]], dtype=F64)
    assert_golden(multiplier, expected)


def test_standardized_lwe_gives_the_golden_weight() -> None:
    excited = Composition([golden_lwe(), Standardize()])(FILTERS)
    expected = torch.tensor(
        [[-0.4735888025, 0.2335129787], [0.3535521406, -0.3535521406]], dtype=F64
    )
    assert_golden(excited, expected)


@BOTH_FORMS
def test_mwe_gives_the_golden_values(form: Form) -> None:
    expected = torch.tensor([1.6744873407, -0.5394560892, 0.2544429371, 0.1002768562], dtype=F64)
    assert_golden(form(MWE(0.1, dtype=F64))(LINE), expected)


@BOTH_FORMS
def test_detached_mwe_has_the_golden_gradients_of_equation_3(form: Form) -> None:
    weight = LINE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(form(MWE(0.1, dtype=F64))(weight).sum(), weight)
    expected = torch.tensor([5.7619047619, 1.2604166667, 1.0544662309, 1.0083333333], dtype=F64)
    assert_golden(gradient, expected)


@BOTH_FORMS
@pytest.mark.parametrize(
    ("upstream", "first"),
    [([1.0, 1.0, 1.0, 1.0], 1.7555094872), ([1.0, 0.0, 0.0, 0.0], 1.6744873407)],
)
def test_undetached_mwe_has_the_golden_gradient_of_the_largest_weight(
    upstream: list[float], first: float, form: Form
) -> None:
    weight = LINE.clone().requires_grad_()
    excited = form(MWE(0.1, detach_max=False, dtype=F64))(weight)
    (gradient,) = torch.autograd.grad(excited, weight, torch.tensor([upstream], dtype=F64))
    assert gradient[0, 0].item() == pytest.approx(first, abs=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "factor", "gain"),
    [
        (1e-3, 500.75, 3.8045),
        (0.01, 50.751, 2.6782),
        (0.05, 10.756, 1.9496),
        (0.1, 5.7619, 1.6745),
        (0.2, 3.2727, 1.4387),
        (0.5, 1.8, 1.2071),
    ],
)
def test_the_largest_weight_has_the_published_factor_and_gain(
    epsilon: float, factor: float, gain: float
) -> None:
    weight = torch.tensor([-2.0, 1.0], dtype=F64, requires_grad=True)
    excited = MWE(epsilon, dtype=F64)(weight)
    (gradient,) = torch.autograd.grad(excited.sum(), weight)
    assert gradient[0].item() == pytest.approx(factor, rel=2e-5)
    assert (excited[0] / weight[0]).item() == pytest.approx(gain, abs=5e-5)


def test_the_stages_compose_in_the_order_of_the_paper() -> None:
    standardize, lwe, mwe = Standardize(), golden_lwe(), MWE(0.1, dtype=F64)
    composed = Composition([mwe, lwe, standardize])
    assert [stage.name for stage in composed.stages] == ["standardize", "lwe", "mwe"]
    assert torch.equal(composed(FILTERS), mwe(lwe(standardize(FILTERS))))
