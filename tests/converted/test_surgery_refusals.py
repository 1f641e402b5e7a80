"""What convert refuses, before it changes anything."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from snapshots import snapshot
from torch import nn
from toys import ConvNet, Zoo, is_vanilla

import we_surgery as ws
from we_surgery.planning.plans import Plan


class DistributedDataParallel(nn.Module):
    """Stands for torch's: it is refused by the name of its class."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("operate", [ws.convert, ws.strip])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "wrapped in DistributedDataParallel"),
        (nn.DataParallel, "wrapped in DataParallel"),
        (lambda m: torch.compile(m, backend="eager"), "wrapped by torch.compile"),
        (lambda m: torch.jit.trace(m.eval(), torch.randn(1, 3, 8, 8)), "TorchScript"),
    ],
    ids=["ddp", "dp", "compile", "trace"],
)
# Deprecated, and still in use; the warnings are about torch's own norm as well.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::we_surgery.errors.NotStrippedWarning")
def test_wrapped_models_are_refused_with_the_way_inside(
    operate: Callable[[nn.Module], nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    message: str,
) -> None:
    inside = ws.convert(ConvNet()) if operate is ws.strip else ConvNet()
    with pytest.raises(ws.InputError, match=message):
        operate(wrap(inside))


def test_a_model_that_cannot_be_copied_is_operated_on_in_place() -> None:
    model = ConvNet()
    model.cache = (_ for _ in ())
    with pytest.raises(ws.SurgeryError, match="cannot be copied") as error:
        ws.convert(model)
    assert "inplace=True" in error.value.cure
    assert is_vanilla(model)
    ws.convert(model, inplace=True)
    ws.strip(model, inplace=True)


@pytest.mark.parametrize("arguments", [{"mode": "we"}, {"config": {}}, {"rules": [ws.Rule("*")]}])
def test_a_plan_beside_a_mode_config_or_rules_is_refused(arguments: dict[str, Any]) -> None:
    plan = ws.plan(ConvNet())
    with pytest.raises(ws.InputError, match="both a plan and a mode, config, rules or"):
        ws.convert(ConvNet(), plan=plan, **arguments)


# Plans that do not fit


def change_row(plan: Plan, layer: str, **changes: Any) -> Plan:
    rows = [replace(row, **changes) if row.layer == layer else row for row in plan.decisions]
    return replace(plan, decisions=tuple(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"module": "stemm"},
            "layer 'stemm', which does not exist in this model; did you mean 'stem'",
        ),
        ({"parameter": "bias"}, "layer 'stem.bias', which does not exist in this model"),
        ({"shape": (8, 3, 5, 5)}, "shape (8, 3, 5, 5) and 1 groups, the model as conv2d"),
        ({"groups": 3}, "3 groups, the model"),
        ({"kind": "conv_transpose2d"}, "as conv_transpose2d of shape"),
        ({"excitation": [{"lew": {}}]}, "no excitation called 'lew'"),
        ({"excitation": [{"lwe": {"reduction": 0}}]}, "reduction must be an integer of at least 1"),
        ({"module": "head"}, "'head'"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(
    changes: dict[str, Any], message: str, inplace: bool
) -> None:
    model = ConvNet()
    plan = change_row(ws.plan(model), "stem", **changes)
    before = snapshot(model)
    with pytest.raises(ws.InputError) as error:
        ws.convert(model, plan=plan, inplace=inplace)
    assert message in error.value.cause
    assert snapshot(model) == before


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(ws.InputError, match="made for this model"):
        ws.convert(ConvNet(), plan=ws.plan(Zoo()))


def test_a_plan_that_names_a_layer_twice_is_refused() -> None:
    plan = ws.plan(ConvNet())
    twice = replace(plan, decisions=(*plan.decisions, plan.decisions[0]))
    with pytest.raises(ws.InputError, match="names layer 'stem' twice"):
        ws.convert(ConvNet(), plan=twice)


def test_a_plan_that_excites_what_cannot_be_excited_is_refused() -> None:
    plan = ws.plan(ConvNet())
    model = ConvNet()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ws.InputError, match="'head'"):
        ws.convert(model, plan=plan)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("left_alone", ["0", "1"])
def test_a_plan_that_excites_one_of_two_tied_layers_is_refused(left_alone: str) -> None:
    plan = change_row(ws.plan(tied()), left_alone, excitation=[])
    with pytest.raises(ws.InputError, match="which is the same Parameter"):
        ws.convert(tied(), plan=plan)


def test_a_plan_that_excites_tied_layers_differently_is_refused() -> None:
    plan = change_row(ws.plan(tied()), "1", excitation=[{"mwe": {"epsilon": 0.2}}])
    with pytest.raises(ws.InputError, match="tied layers '0' and '1' in different ways"):
        ws.convert(tied(), plan=plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(value: float) -> None:
    model = ConvNet()
    model.head.weight.data[0, 0] = value
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ws.SurgeryError, match="weight of layer 'head' holds 1 non-finite"):
        ws.convert(model, inplace=True)
    assert [type(m) for m in model.modules()] == classes
