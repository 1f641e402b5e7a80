"""MWE's other curves and what of it can be learned."""

import math

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import MWE, Composition
from we_surgery.excitations.mwe import CURVES

F64 = torch.float64
X = torch.linspace(-1, 1, 9, dtype=F64)

BY_HAND = {
    "atanh": lambda x: 0.5 * math.log((1 + x) / (1 - x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "swish": lambda x: x / (1 + math.exp(-x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "shifted_softplus": lambda x: math.log(1 + math.exp(x)) - math.log(2),
    "lecun_tanh": lambda x: 1.7159 * math.tanh(2 * x / 3),
    "star_relu": lambda x: 0.8944 * max(x, 0.0) ** 2 - 0.4472,
    "novel": lambda x: 0.5 * x / math.log(1 + math.exp(-0.3 * x)),
    "novel_log10": lambda x: 0.5 * x / math.log10(1 + math.exp(-0.3 * x)),
}


@pytest.mark.parametrize("curve", CURVES)
def test_each_curve_is_its_formula(curve: str) -> None:
    x = X * 0.9
    expected = torch.tensor([BY_HAND[curve](value) for value in x.tolist()], dtype=F64)
    torch.testing.assert_close(CURVES[curve](x), expected)


@pytest.mark.parametrize(
    ("curve", "slope", "at_1", "at_minus_1"),
    [("novel_log10", 1.6610, 2.0768, -1.3476), ("novel", 0.7213, 0.9019, -0.5852)],
)
def test_the_novel_curve_has_its_golden_values(
    curve: str, slope: float, at_1: float, at_minus_1: float
) -> None:
    x = torch.tensor([0.0, 1.0, -1.0], dtype=F64, requires_grad=True)
    y = CURVES[curve](x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient[0].item() == pytest.approx(slope, abs=5e-5)
    assert y[1:].tolist() == pytest.approx([at_1, at_minus_1], abs=5e-5)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_bends_the_weights_over_the_limit(curve: str, rescale: bool) -> None:
    weight = torch.tensor([[2.0, -4.0, 0.5, 1.0]], dtype=F64)
    limit = 1.1 * 4.0
    expected = [BY_HAND[curve](w / limit) * (limit if rescale else 1) for w in weight[0].tolist()]
    found = MWE(0.1, curve=curve, rescale=rescale, dtype=F64)(weight)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=F64))


@pytest.mark.parametrize("curve", [curve for curve in CURVES if curve != "atanh"])
def test_a_curve_may_take_the_weight_itself(curve: str) -> None:
    weight = torch.tensor([[3.0, -4.0, 0.5, 0.01]], dtype=F64)
    expected = [BY_HAND[curve](w) for w in weight[0].tolist()]
    found = MWE(0.1, curve=curve, relative=False, dtype=F64)(weight)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=F64))


def test_equation_37_as_printed_raises_large_weights_and_lowers_small_ones() -> None:
    weight = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0], dtype=F64)  # of standardized filters
    ratio = MWE(curve="novel", relative=False)(weight) / weight
    assert (ratio[:3] < 1).all()
    assert (ratio[3:] > 1).all()


def curve_by_hand(weight: float, largest: float) -> tuple[float, float]:
    """The excited weight and its slope, of M = largest; straight from M on."""
    pole = 1.1 * largest
    if abs(weight) > largest:
        gain = 1.1 * 0.5 * math.log((1 + 1 / 1.1) / (1 - 1 / 1.1))
        return gain * weight, gain
    excited = pole * 0.5 * math.log((1 + weight / pole) / (1 - weight / pole))
    return excited, pole**2 / (pole**2 - weight**2)


WEIGHT = [[1.0, -0.5, 0.25, 0.1], [0.2, 0.02, -0.4, 3.0]]


@pytest.mark.parametrize(
    ("maximum", "largest"),
    [("filter", [1.0, 3.0]), (0.75, [0.5, 0.5]), (0.01, [0.02, 0.02]), ("tensor", [3.0, 3.0])],
)
def test_the_maximum_is_that_of_a_filter_or_a_quantile(
    maximum: str | float, largest: list[float]
) -> None:
    weight = torch.tensor(WEIGHT, dtype=F64, requires_grad=True)
    mwe = MWE(maximum=maximum)
    excited = mwe(weight)
    (slope,) = torch.autograd.grad(excited.sum(), weight)
    expected = torch.tensor(
        [[curve_by_hand(w, m) for w in row] for row, m in zip(WEIGHT, largest, strict=True)],
        dtype=F64,
    )
    torch.testing.assert_close(excited, expected[..., 0])
    torch.testing.assert_close(slope, expected[..., 1])
    torch.testing.assert_close(mwe.right_inverse(excited.detach()), weight.detach())


def test_a_quantile_of_a_weight_that_is_mostly_zero_keeps_it_finite() -> None:
    weight = torch.zeros(4, 5)
    weight[0, 0] = 2.0
    assert MWE(maximum=0.5)(weight)[0, 0].item() == pytest.approx(2.0 * 1.6744873407)


def steps(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("learn", "start", "detach_max"),
    [("epsilon", 0.1, True), ("epsilon", 0.05, False), ("mix", 1.0, True)],
)
def test_what_is_learned_starts_where_it_was_and_moves(
    learn: str, start: float, detach_max: bool
) -> None:
    options = {"learn": learn, "detach_max": detach_max}
    options |= {"epsilon": start} if learn == "epsilon" else {}
    model = ws.convert(nn.Linear(6, 5), config={"mwe": options})
    fixed = MWE(start if learn == "epsilon" else 0.1, detach_max)
    torch.testing.assert_close(model.weight, fixed(model.raw_weight))

    def value(mwe: MWE) -> Tensor:
        return mwe.mix if learn == "mix" else mwe._epsilon()

    mwe = model.excitation.mwe
    before = value(mwe).item()
    assert before == pytest.approx(start, rel=1e-5)
    steps(model)
    assert value(mwe).item() != before
    stripped = ws.strip_state_dict(model.state_dict())
    assert torch.equal(stripped["weight"], model.weight)


def test_a_mix_of_a_half_is_half_way() -> None:
    mwe = MWE(learn="mix")
    with torch.no_grad():
        mwe.mix.fill_(0.5)
    weight = torch.randn(3, 4)
    torch.testing.assert_close(mwe(weight), (weight + MWE()(weight)) / 2)


def test_a_mix_that_has_moved_starts_anew_where_a_weight_is_to_stay() -> None:
    composition = Composition([MWE(learn="mix")])
    with torch.no_grad():
        composition.mwe.mix.fill_(0.3)
    weight = torch.randn(3, 4)
    torch.testing.assert_close(composition(composition.preserve(weight)), weight)


def test_an_epsilon_that_is_driven_down_keeps_the_weights_finite() -> None:
    mwe = MWE(learn="epsilon")
    with torch.no_grad():
        mwe.rho.fill_(-200.0)
    assert mwe(torch.randn(5, 6)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "atan"}, "mwe: curve must be one of atanh, sigmoid"),
        ({"learn": "all"}, "mwe: learn must be one of none, epsilon, mix"),
        ({"rescale": 0}, "mwe: rescale must be true or false"),
        ({"maximum": "layer"}, "mwe: maximum must be tensor, filter or a quantile"),
        ({"maximum": 1.0}, "mwe: maximum must be tensor, filter or a quantile"),
        ({"relative": False}, "mwe: relative=False needs another curve than atanh"),
        ({"relative": False, "curve": "tanh", "learn": "epsilon"}, "has no epsilon to learn"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ws.InputError, match=message):
        ws.plan(nn.Linear(3, 3), config={"mwe": options})


@pytest.mark.parametrize("start", ["on", "paused"])
def test_a_curve_without_an_inverse_cannot_start_as_the_model_does(start: str) -> None:
    with pytest.raises(ws.InputError, match="mwe cannot start as an identity") as caught:
        ws.convert(nn.Linear(3, 3), config={"mwe": {"curve": "gelu"}}, init="preserve", start=start)
    assert "`init='paper'`" in caught.value.cure
