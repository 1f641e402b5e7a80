"""The proof of a strip: bit-equality, finiteness, outputs, and the state it leaves behind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.converted.proof import (
    check_fold,
    check_outputs,
    eval_mode,
    largest_differences,
    refuse_non_finite,
    run_in_eval,
    same_bits,
)
from we_surgery.errors import InputError, SurgeryError

NAN, INFINITY = float("nan"), float("inf")


def test_equal_folds_pass() -> None:
    weight = torch.randn(3, 4)
    check_fold("layer", weight, weight.clone())
    check_fold("layer", weight.to("meta"), weight.to("meta"))


@pytest.mark.parametrize(
    "folded",
    [torch.tensor([1.0, 2.0000002]), torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0])],
    ids=["one bit", "dtype", "shape"],
)
def test_a_fold_that_differs_in_a_bit_fails_and_names_the_layer(folded: Tensor) -> None:
    with pytest.raises(SurgeryError, match=r"layer 'stage\.0' is not bit-equal"):
        check_fold("stage.0", torch.tensor([1.0, 2.0]), folded)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    weight = torch.tensor([value, 1.0, value])
    with pytest.raises(SurgeryError, match="weight of layer 'a' holds 2 non-finite values of 3"):
        refuse_non_finite("a", weight, "the weight")
    with pytest.raises(SurgeryError, match="the folded weight of layer 'a' holds 2"):
        check_fold("a", weight, weight)


@pytest.mark.parametrize(
    ("before", "after", "absolute", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, 0.0),
        ([0.5, 0.0], [0.5, 0.25], 0.25, 0.25),
        ([100.0, 4.0], [100.0, 3.0], 1.0, 0.01),
        ([NAN, 1.0], [NAN, 1.0], 0.0, 0.0),
        ([INFINITY, 1.0], [INFINITY, 1.0], 0.0, 0.0),
        ([INFINITY, 1.0], [INFINITY, 1.5], 0.5, 0.5),
        ([INFINITY, 1.0], [1.0, 1.0], INFINITY, INFINITY),
        ([], [], 0.0, 0.0),
        ([1 + 2j], [1 + 1j], 1.0, 0.5),
        ([True, False], [True, True], 1.0, 1.0),
    ],
)
def test_differences_are_absolute_and_relative_to_the_largest_output(
    before: list[Any], after: list[Any], absolute: float, relative: float
) -> None:
    pair = [torch.tensor(before)], [torch.tensor(after)]
    assert largest_differences(*pair) == pytest.approx((absolute, relative))


@pytest.mark.parametrize(
    ("before", "after"), [([NAN], [1.0]), ([1.0], [NAN]), ([INFINITY], [-INFINITY]), ([1.0], [1.1])]
)
def test_outputs_that_differ_fail(before: list[float], after: list[float]) -> None:
    good = torch.ones(3)
    with pytest.raises(SurgeryError, match="outputs differ"):
        check_outputs([good, torch.tensor(before), good], [good, torch.tensor(after), good])


def test_outputs_that_differ_by_rounding_pass() -> None:
    before = torch.tensor([1000.0, 1.0])
    assert check_outputs([before], [before + 0.005]) == pytest.approx((0.005, 5e-6), rel=1e-2)


@pytest.mark.parametrize("after", [[torch.ones(2)], [torch.ones(3), torch.ones(3)], []])
def test_outputs_of_another_shape_or_number_fail(after: list[Tensor]) -> None:
    with pytest.raises(SurgeryError, match="returns other shapes"):
        check_outputs([torch.ones(3)], after)


class Pair(NamedTuple):
    """A structured output."""

    a: Tensor
    b: list[Tensor]


class Flexible(nn.Module):
    """Takes and returns what people pass around, and draws random numbers in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor | None = None, *, twice: bool = False) -> Any:
        x = self.dropout(x) * self.scale + torch.rand(3)
        y = x if y is None else y
        return Pair(x, [y * 2 if twice else y]) if y is not x else {"out": x}


X, Y = torch.ones(3), torch.full((3,), 3.0)


@pytest.mark.parametrize(
    ("inputs", "count"),
    [(X, 1), ((X,), 1), ([X, Y], 2), ({"x": X, "y": Y, "twice": True}, 2)],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_example_inputs_come_in_any_form(inputs: Any, count: int) -> None:
    outputs = run_in_eval(Flexible(), inputs)
    assert len(outputs) == count
    assert not any(output.requires_grad for output in outputs)
    if count == 2 and isinstance(inputs, dict):
        assert torch.equal(outputs[1], 2 * Y)


def test_two_runs_are_given_the_same_random_numbers_and_the_caller_keeps_its_own() -> None:
    model = Flexible()
    once = run_in_eval(model, X)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = run_in_eval(model, X)
    assert torch.equal(once[0], again[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_each_module_gets_its_own_training_flag_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    flags = [m.training for m in model.modules()]
    with eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags
    run_in_eval(model, torch.randn(3, 2))
    assert [m.training for m in model.modules()] == flags
    assert model[1][1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_layers_behind_an_exported_program_are_in_eval_mode_too() -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    model = nn.Sequential(exported, nn.Dropout())
    with pytest.raises(NotImplementedError):
        model.eval()
    model[1].train()
    with eval_mode(model):
        assert not model[1].training
    assert model[1].training


def test_a_training_flag_comes_back_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    model[0].eval()
    with pytest.raises(InputError):
        run_in_eval(model, torch.randn(1, 4))
    assert [m.training for m in model.modules()] == [True, False, True]


def test_a_model_that_fails_on_the_inputs_is_an_input_error_with_its_cause() -> None:
    with pytest.raises(InputError, match=r"on the example inputs: RuntimeError: .*mat1"):
        run_in_eval(nn.Linear(3, 2), torch.randn(1, 4))


class Silent(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> str:
        return "done"


def test_a_model_that_returns_no_tensor_is_an_input_error() -> None:
    with pytest.raises(InputError, match="returns no tensor but str"):
        run_in_eval(Silent(), X)


EYE = torch.eye(4)
VALUES = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def per_channel(scales: list[float], axis: int = 0) -> Tensor:
    zeros = torch.zeros(2, dtype=torch.long)
    scale = torch.tensor(scales, dtype=torch.float64)
    return torch.quantize_per_channel(VALUES, scale, zeros, axis, torch.qint8)


def per_tensor(scale: float, zero: int = 0) -> Tensor:
    return torch.quantize_per_tensor(VALUES, scale, zero, torch.qint8)


UNLIKE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "coordinates": lambda: (EYE.to_sparse(), (2 * EYE).to_sparse()),
    "other coordinates": lambda: (EYE.to_sparse(), EYE.flip(0).to_sparse()),
    "rows": lambda: (EYE.to_sparse_csr(), EYE.flip(0).to_sparse_csr()),
    "columns": lambda: (EYE.to_sparse_csc(), (-EYE).to_sparse_csc()),
    "blocks": lambda: (EYE.to_sparse_bsr((2, 2)), (2 * EYE).to_sparse_bsr((2, 2))),
    "two layouts": lambda: (EYE.to_sparse_csr(), EYE.to_sparse()),
    "scale": lambda: (per_tensor(0.5), per_tensor(0.25)),
    "zero": lambda: (per_tensor(0.5), per_tensor(0.5, 1)),
    "scales": lambda: (per_channel([0.5, 0.5]), per_channel([0.5, 0.25])),
    "axis": lambda: (per_channel([0.5, 0.5]), per_channel([0.5, 0.5], axis=1)),
    "schemes": lambda: (per_tensor(0.5), per_channel([0.5, 0.5])),
    "conjugated": lambda: (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "negated": lambda: (torch.ones(2), torch._neg_view(torch.ones(2))),
    "without values": lambda: (torch.ones(2), torch.ones(2, device="meta")),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", UNLIKE)
def test_tensors_of_every_kind_are_compared_by_all_they_hold(name: str) -> None:
    one, other = UNLIKE[name]()
    assert same_bits(one, one.clone())
    assert same_bits(other, other.clone())
    assert not same_bits(one, other)


class Remembers(nn.Module):
    """Changes its input and all kinds of its own state in each forward, and computes by them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(4))
        self.plain = torch.zeros(4)
        self.calls = 0
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        y = self.linear(x + self.state + self.plain + self.calls)
        for kept in self.cache:
            y = y + kept
        self.state = self.state + 1
        self.plain.add_(1)
        self.calls += 1
        self.cache.append(y)
        self.last = y
        return y


@pytest.mark.parametrize("inplace", [False, True])
def test_both_models_start_from_one_state_which_a_strip_leaves_as_it_is(inplace: bool) -> None:
    model, x = ws.convert(Remembers(), "mwe"), torch.randn(2, 4)
    inputs, modes = x.clone(), [module.training for module in model.modules()]
    for found in (ws.strip(model, example_inputs=x, inplace=inplace), model):
        assert torch.equal(x, inputs)
        assert (found.calls, found.cache) == (0, [])
        assert not hasattr(found, "last")
        assert not found.state.any()
        assert not found.plain.any()
    assert inplace or [module.training for module in model.modules()] == modes


def test_state_comes_back_after_a_failure() -> None:
    model = Remembers()
    buffer = model.state
    with pytest.raises(InputError):
        run_in_eval(nn.Sequential(model, nn.Linear(3, 3)), torch.randn(2, 4))
    assert model.state is buffer
    assert (model.calls, model.cache) == (0, [])


def test_inputs_that_need_gradients_still_do() -> None:
    class Forces(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return torch.autograd.grad(super().forward(x).sum(), x)[0]

    x = torch.randn(2, 4, requires_grad=True)
    assert run_in_eval(Forces(4, 1), x)[0].shape == x.shape
