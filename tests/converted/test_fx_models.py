"""A GraphModule under convert and strip, copies, pickles and plans."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_modules import (
    SOURCES,
    X,
    decomposed,
    dispatched,
    everything_of,
    exported,
    nodes_of,
    traced,
    train_a_little,
)
from torch import nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.converted import WEConv2d, WELinear
from we_surgery.converted.graphs import excited_weights
from we_surgery.fx import ExcitePass, StripPass


def saved_and_loaded(graph_module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(graph_module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("make", "transport"),
    [
        (traced, copy.deepcopy),
        (exported, copy.deepcopy),
        (decomposed, copy.deepcopy),
        (dispatched, copy.deepcopy),
        (traced, saved_and_loaded),
        (dispatched, saved_and_loaded),  # torch itself cannot pickle an exported module
    ],
)
def test_an_excited_graph_can_be_copied_and_pickled(
    make: Callable[[], Any], transport: Callable[[nn.Module], Any]
) -> None:
    graph_module = make()
    nodes, keys = nodes_of(graph_module), list(graph_module.state_dict())
    ExcitePass(config=EVERYTHING)(graph_module)
    with torch.no_grad():
        expected = graph_module(X)
    moved = transport(graph_module)
    assert torch.equal(moved(X), expected)
    moved.graph.lint()
    assert len(list(excited_weights(moved))) == len(list(excited_weights(graph_module)))
    train_a_little(moved)
    assert all(parameter.grad is not None for parameter in moved.parameters())
    with torch.no_grad():
        assert torch.equal(graph_module(X), expected)
        trained = moved(X)
    assert StripPass(example_inputs=X)(moved).modified
    assert torch.equal(moved(X), trained)
    assert sorted(moved.state_dict()) == sorted(keys)
    if make is not dispatched:  # it notes operations that no one needs, which a pickle drops
        assert nodes_of(moved) == nodes
    assert next(excited_weights(graph_module), None) is not None


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_the_checkpoint_of_an_excited_graph_strips_without_it(make: Callable[[], Any]) -> None:
    graph_module = make()
    keys = list(graph_module.state_dict())
    ExcitePass(config=EVERYTHING)(graph_module)
    train_a_little(graph_module)
    stripped = ws.strip_state_dict(graph_module.state_dict())
    StripPass()(graph_module)
    assert list(stripped) == keys
    for name, value in graph_module.state_dict().items():
        assert torch.equal(stripped[name], value), name
    make().load_state_dict(stripped)


def test_a_vanilla_graph_refuses_the_checkpoint_of_an_excited_one() -> None:
    graph_module = traced()
    ExcitePass()(graph_module)
    with pytest.raises(RuntimeError, match="raw_stem_weight"):
        traced().load_state_dict(graph_module.state_dict())


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_convert_and_strip_copy_a_graph_module(make: Callable[[], Any]) -> None:
    graph_module = make()
    before = everything_of(graph_module)
    converted: Any = ws.convert(graph_module, config=EVERYTHING, example_inputs=X)
    assert everything_of(graph_module) == before
    assert converted.we_surgery_plan["mode"] == "lwe+mwe"
    after = everything_of(converted)
    stripped, report = ws.strip_with_report(converted, example_inputs=X)
    assert everything_of(converted) == after
    assert report.layers == 5
    assert report.output_difference == 0
    assert report.parameters == sum(p.numel() for p in graph_module.parameters())
    assert not hasattr(stripped, "we_surgery_plan")
    assert nodes_of(stripped) == before[0]
    assert list(stripped.state_dict()) == list(graph_module.state_dict())
    with pytest.warns(ws.AlreadyConvertedWarning):
        again: Any = ws.convert(converted)
    assert again.we_surgery_plan == converted.we_surgery_plan
    with pytest.warns(ws.NothingToStripWarning):
        ws.strip(stripped)


def test_a_copy_keeps_what_the_graph_does_not_read_and_its_order() -> None:
    graph_module = traced()
    graph_module.unread = nn.Parameter(torch.randn(2))
    graph_module.same = graph_module.unread
    graph_module.spare = nn.Conv2d(3, 3, 1)
    graph_module.label = "mine"
    moved = graph_module._parameters.pop("bias")
    graph_module._parameters["bias"] = moved
    keys = list(graph_module.state_dict())
    converted: Any = ws.convert(graph_module)
    assert isinstance(converted.spare, WEConv2d)
    assert converted.label == "mine"
    assert converted.same is converted.unread is not graph_module.unread
    assert list(ws.strip(converted).state_dict()) == keys
    assert converted(X).shape == (2, 5)


def test_a_graph_module_inside_another_model_is_converted_too() -> None:
    model = nn.Sequential(traced(), nn.Linear(5, 4))
    keys = list(model.state_dict())
    converted = ws.convert(model, example_inputs=X)
    assert "0.raw_stem_weight" in converted.state_dict()
    assert isinstance(converted[1], WELinear)
    stripped = ws.strip(converted, example_inputs=X)
    assert list(stripped.state_dict()) == keys
    assert nodes_of(stripped[0]) == nodes_of(model[0])  # type: ignore[arg-type]


def test_a_plan_survives_json_and_fits_the_network_it_was_exported_from() -> None:
    model = ConvNet()
    plan = ws.Plan.from_dict(ws.plan(model).to_dict())
    graph_module: Any = torch.export.export(model, (X,)).module()
    ExcitePass(plan=plan)(graph_module)
    excited = {weight.module for weight in excited_weights(graph_module)}
    assert excited == {row.module for row in plan.excited}
    StripPass(example_inputs=X)(graph_module)


def test_a_plan_comes_alone() -> None:
    with pytest.raises(ws.InputError, match="both a plan and a mode"):
        ExcitePass("lwe", plan=ws.plan(traced()))


def test_a_pass_refuses_an_unknown_mode_before_it_is_run() -> None:
    with pytest.raises(ws.InputError, match="no mode"):
        ExcitePass("lve")
