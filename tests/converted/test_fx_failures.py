"""Graphs that cannot be excited or stripped, and what other passes did to them."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_modules import X, everything_of, exported, find, nodes_of, traced, train_a_little
from torch import Tensor, fx, nn
from toys import EVERYTHING

import we_surgery as ws
from we_surgery.converted import excite, strip
from we_surgery.fx import ExcitePass, StripPass


def break_a_weight(graph_module: fx.GraphModule) -> None:
    graph_module.up.weight.data[0] = float("nan")


def break_the_graph(graph_module: fx.GraphModule) -> None:
    first, second, *_ = (n for n in graph_module.graph.nodes if n.op == "call_function")
    second.append(first)


@pytest.mark.parametrize("damage", [break_a_weight, break_the_graph])
def test_a_graph_that_cannot_be_excited_is_left_as_it_was(
    damage: Callable[[fx.GraphModule], None],
) -> None:
    graph_module = traced()
    damage(graph_module)
    before = repr(everything_of(graph_module))
    with pytest.raises(ws.WESurgeryError):
        ExcitePass()(graph_module)
    assert repr(everything_of(graph_module)) == before


@pytest.mark.parametrize(("at", "fails_at"), [("excite_owner", 3), ("update_graphs", 1)])
def test_a_failure_halfway_leaves_the_graph_as_it_was(
    at: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(excite, at), []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("no more")
        real(*arguments)

    graph_module = traced()
    before = everything_of(graph_module)
    monkeypatch.setattr(excite, at, failing)
    with pytest.raises(OSError, match="no more"):
        ExcitePass(config=EVERYTHING)(graph_module)
    assert len(calls) >= fails_at
    assert everything_of(graph_module) == before


def test_a_failed_proof_leaves_the_graph_excited(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ws.SurgeryError("not equal", "none")

    graph_module = traced()
    ExcitePass(config=EVERYTHING)(graph_module)
    train_a_little(graph_module)
    before, expected = everything_of(graph_module), graph_module.eval()(X)
    graph_module.train()
    monkeypatch.setattr(strip, "check_outputs", refuse)
    with pytest.raises(ws.SurgeryError, match="not equal"):
        StripPass(example_inputs=X)(graph_module)
    assert everything_of(graph_module)[0] == before[0]
    assert everything_of(graph_module)[2] == before[2]
    assert torch.equal(graph_module.eval()(X), expected)
    monkeypatch.undo()
    assert StripPass(example_inputs=X)(graph_module).modified


def test_a_raw_weight_read_behind_the_graphs_back_is_found_and_undone() -> None:
    class Peeking(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.hidden = [weight]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.hidden[0])

    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))
            self.peeking = Peeking(self.w)

        def forward(self, x: Tensor) -> Tensor:
            return self.peeking(F.linear(x, self.w))

    class KeepPeeking(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Peeking)

    model = Bypassed()
    graph_module = fx.GraphModule(model, KeepPeeking().trace(model))
    before, x = everything_of(graph_module), torch.randn(2, 3)
    with pytest.raises(ws.SurgeryError, match="reads 'raw_w' itself"):
        ExcitePass(example_inputs=x)(graph_module)
    assert everything_of(graph_module) == before


def test_a_graph_that_was_rewritten_around_its_excitations_is_not_stripped() -> None:
    def read_the_raw_weight(graph_module: fx.GraphModule) -> None:
        (excitation,) = find(graph_module, "stem_excitation")
        (user,) = excitation.users
        user.replace_input_with(excitation, excitation.args[0])  # type: ignore[arg-type]

    def scale_the_raw_weight(graph_module: fx.GraphModule) -> None:
        (excitation,) = find(graph_module, "stem_excitation")
        with graph_module.graph.inserting_before(excitation):
            scaled = graph_module.graph.call_function(torch.mul, (excitation.args[0], 2))
        excitation.args = (scaled,)

    def feed_another_weight(graph_module: fx.GraphModule) -> None:
        (excitation,) = find(graph_module, "stem_excitation")
        (other,) = find(graph_module, "raw_twice")
        excitation.args = (other,)

    def feed_something_else(graph_module: fx.GraphModule) -> None:
        (excitation,) = find(graph_module, "stem_excitation")
        with graph_module.graph.inserting_before(excitation):
            other = graph_module.graph.call_function(torch.ones, (8, 3, 3, 3))
        excitation.args = (other,)

    rewrites = (
        read_the_raw_weight,
        scale_the_raw_weight,
        feed_another_weight,
        feed_something_else,
    )
    for rewrite in rewrites:
        graph_module = traced()
        ExcitePass()(graph_module)
        rewrite(graph_module)
        graph_module.recompile()
        before = everything_of(graph_module)
        with pytest.raises(ws.SurgeryError, match="the graph was changed after its conversion"):
            StripPass()(graph_module)
        assert everything_of(graph_module) == before


def test_excitations_that_another_pass_copied_or_removed_as_dead_code_are_stripped() -> None:
    graph_module = traced()
    ExcitePass()(graph_module)
    (excitation,) = find(graph_module, "twice_excitation")
    first, second = excitation.users
    with graph_module.graph.inserting_before(second):
        again = graph_module.graph.node_copy(excitation, lambda node: node)
    second.replace_input_with(excitation, again)
    (stem,) = find(graph_module, "stem_excitation")
    (conv,) = stem.users
    conv.replace_all_uses_with(conv.args[0])  # type: ignore[arg-type]
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    StripPass()(graph_module)
    graph_module.graph.lint()
    assert not [n for n in graph_module.graph.nodes if "excitation" in str(n.target)]
    assert "stem_weight" in graph_module.state_dict()
    assert first.args[1] is second.args[1]


def test_the_proof_leaves_running_statistics_alone() -> None:
    graph_module = exported()  # in training: each forward updates them
    ExcitePass(example_inputs=X)(graph_module)
    statistics = {name: value.clone() for name, value in graph_module.named_buffers()}
    StripPass(example_inputs=X)(graph_module)
    for name, value in graph_module.named_buffers():
        assert torch.equal(value, statistics[name]), name


def test_the_excitation_node_carries_the_shape_of_the_weight() -> None:
    graph_module = exported()
    ExcitePass()(graph_module)
    for node in graph_module.graph.nodes:
        if "excitation" in str(node.target):
            assert node.meta["val"].shape == node.args[0].meta["val"].shape


def test_an_excited_graph_compiles_without_breaks() -> None:
    graph_module = traced().eval()
    ExcitePass()(graph_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(graph_module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), graph_module(X))


def test_a_failing_example_is_one_error_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph_module = traced()
    ExcitePass()(graph_module)
    before = everything_of(graph_module)
    with pytest.raises(ws.InputError, match="the model fails on the example inputs"):
        StripPass(example_inputs=torch.randn(2, 4, 8, 8))(graph_module)
    assert everything_of(graph_module) == before
    assert capsys.readouterr() == ("", "")


def test_a_graph_traced_from_a_converted_network_strips() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class KeepLayers(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Linear)

    model = ws.convert(Shared())
    graph = KeepLayers().trace(model)
    x = graph.find_nodes(op="placeholder")[0]
    (layer,) = graph.find_nodes(op="call_module")
    with graph.inserting_before(layer):
        again = graph.call_function(F.linear, (x, graph.create_node("get_attr", "fc.weight")))
    layer.args = (again,)
    graph_module = fx.GraphModule(model, graph)
    assert StripPass(example_inputs=torch.randn(2, 4))(graph_module).modified
    assert nodes_of(graph_module) == [
        ("placeholder", "x"),
        ("get_attr", "fc.weight"),
        ("call_function", str(F.linear)),
        ("call_module", "fc"),
        ("output", "output"),
    ]


def test_a_parameter_that_is_called_raw_by_its_owner_is_none_of_ours() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw_weight = nn.Parameter(torch.randn(3, 3))
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.raw_weight), self.weight)

    graph_module = fx.symbolic_trace(Raw())
    nodes = nodes_of(graph_module)
    rows = {row.parameter: row for row in ws.plan(graph_module).decisions}
    assert rows["weight"].reason == "has an attribute 'raw_weight' of its own"
    ExcitePass()(graph_module)
    assert set(graph_module.state_dict()) == {
        "raw_raw_weight",
        "raw_excitation._extra_state",
        "weight",
    }
    StripPass(example_inputs=torch.randn(2, 3))(graph_module)
    assert nodes_of(graph_module) == nodes
