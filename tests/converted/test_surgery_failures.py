"""A convert or strip that fails on the way leaves no trace."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from snapshots import snapshot
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import EVERYTHING, ConvNet, Zoo

import we_surgery as ws
from we_surgery.converted import excite as exciting
from we_surgery.excitations import Composition, WeightLayout, build_excitation


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("fails_at", [0, 3, 5])
def test_a_failure_at_any_site_leaves_the_model_as_it_was(
    fails_at: int, init: Literal["paper", "preserve"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Zoo()
    model.attention.eval()
    plan = ws.plan(model, "lwe")
    assert len(plan.excited) == 5
    before, calls, real = snapshot(model), [], exciting.excite_owner

    def excite(*arguments: Any) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(arguments)
        real(*arguments)

    monkeypatch.setattr(exciting, "excite_owner", excite)
    if fails_at == 5:
        ws.convert(model, plan=plan, init=init, inplace=True)
        assert snapshot(model) != before
        return
    with pytest.raises(KeyboardInterrupt):
        ws.convert(model, plan=plan, init=init, inplace=True)
    assert snapshot(model) == before
    assert not hasattr(model, "we_surgery_plan")


def trained() -> nn.Module:
    """A converted model with gradients and a tied pair, as strip finds it after training."""
    model = ConvNet()
    model.twin = nn.Linear(12, 5)
    model.twin.weight = model.head.weight
    converted = ws.convert(model, config=EVERYTHING)
    converted(torch.randn(2, 3, 8, 8)).square().sum().backward()
    return converted


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fails_at", [0, 2, 4])
def test_a_failure_at_any_restored_layer_leaves_the_model_as_it_was(
    fails_at: int, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    before, calls, real = snapshot(model), [], exciting.restore_owner

    def restore(layer: nn.Module) -> None:
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        calls.append(layer)
        real(layer)

    monkeypatch.setattr(exciting, "restore_owner", restore)
    with pytest.raises(KeyboardInterrupt):
        ws.strip(model, inplace=inplace)
    assert snapshot(model) == before


class Noisy(Composition):
    """An excitation that never gives the same weight twice."""

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) + torch.rand(())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_fold_that_is_not_deterministic_fails_and_changes_nothing(inplace: bool) -> None:
    model = trained()
    stages = build_excitation([{"mwe": {}}], WeightLayout((5, 12))).stages
    model.head.excitation = model.twin.excitation = Noisy(stages)
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="layer 'head' is not bit-equal"):
        ws.strip(model, inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_fold_that_is_not_finite_fails_and_changes_nothing(value: float, inplace: bool) -> None:
    model = trained()
    model.grouped.raw_weight.data[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="folded weight of layer 'grouped' holds"):
        ws.strip(model, inplace=inplace)
    assert repr(snapshot(model)) == repr(before)  # NaN is not equal to itself, but prints the same


class Bypass(nn.Module):
    """A parent that reads the raw weight, behind the excitation's back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.conv, "raw_weight", self.conv.weight)
        return nn.functional.conv2d(x, weight, self.conv.bias)


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_that_differ_fail_the_strip_and_change_nothing(inplace: bool) -> None:
    model = ws.convert(nn.Sequential(Bypass(), nn.MultiheadAttention(4, 2)), config=EVERYTHING)
    model.forward = model[0].forward
    model[0].conv.raw_weight.grad = torch.ones_like(model[0].conv.raw_weight)
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match="stripped model's outputs differ by"):
        ws.strip(model, example_inputs=torch.randn(1, 3, 5, 5), inplace=inplace)
    assert snapshot(model) == before
    assert hasattr(model, "we_surgery_plan")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_conversion_that_is_not_proven_changes_nothing(inplace: bool) -> None:
    model = nn.Sequential(Bypass(), nn.Conv2d(4, 4, 3))
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match=r"reads '0\.conv\.raw_weight' itself"):
        ws.convert(model, example_inputs=torch.randn(1, 3, 7, 7), inplace=inplace)
    assert snapshot(model) == before


class RunsChildren(nn.Module):
    """Owns a kernel, and runs whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return nn.functional.conv2d(x, self.kernel)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_excitation_that_would_run_on_activations_is_found(inplace: bool) -> None:
    model = RunsChildren()
    before = snapshot(model)
    with pytest.raises(ws.SurgeryError, match=r"'kernel_excitation.*' runs on activations"):
        ws.convert(model, example_inputs=torch.randn(1, 3, 7, 7), inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_example_inputs_that_do_not_fit_change_nothing(inplace: bool) -> None:
    model = trained()
    before = snapshot(model)
    with pytest.raises(ws.InputError, match="the model fails on the example inputs"):
        ws.strip(model, example_inputs=torch.randn(1, 7, 5, 5), inplace=inplace)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: prune.l1_unstructured(m.stem, "raw_weight", 0.5),
            "layer 'stem' was changed after its conversion: its 'raw_weight' is not a Parameter",
        ),
        (
            lambda m: torch.nn.utils.parametrizations.weight_norm(m.stem, "raw_weight"),
            "'raw_weight' is not a Parameter",
        ),
        (
            lambda m: torch.nn.utils.parametrize.register_parametrization(
                m.head, "bias", nn.Identity()
            ),
            "layer 'head' was changed after its conversion: its class is ParametrizedWELinear",
        ),
    ],
    ids=["pruned", "parametrized", "parametrized bias"],
)
def test_a_layer_that_was_changed_after_its_conversion_is_not_stripped_silently(
    change: Callable[[nn.Module], object], message: str
) -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING)
    change(model)
    with pytest.raises(ws.SurgeryError, match=message):
        ws.strip(model, inplace=True)


def test_an_interrupted_strip_can_be_repeated() -> None:
    model = trained()
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(x)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ws.strip_with_report(model, inplace=True, progress=interrupt)
    assert torch.equal(ws.strip(model, example_inputs=x, inplace=True).eval()(x), expected)


class NeedsKeyword(nn.Linear):
    """Takes no subclass that does not say more than we can know."""

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


class Demanding(type):
    """A metaclass that wants to be told something."""

    def __new__(mcs, name: str, bases: Any, attributes: Any, *, key: str) -> Any:
        return super().__new__(mcs, name, bases, attributes)

    def __init__(cls, name: str, bases: Any, attributes: Any, *, key: str) -> None:
        super().__init__(name, bases, attributes)


class OfDemanding(nn.Linear, metaclass=Demanding, key="mine"):
    """A layer of that metaclass."""


@pytest.mark.parametrize("layer_class", [NeedsKeyword, OfDemanding])
def test_a_class_that_takes_no_subclass_is_named_with_its_layer(
    layer_class: type[nn.Linear],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer_class(4, 4))
    with pytest.raises(ws.SurgeryError, match=rf"'1' is of class {layer_class.__name__}.*'key'"):
        ws.convert(model, "mwe", inplace=True)
    assert [type(layer) for layer in model] == [nn.Linear, layer_class]
