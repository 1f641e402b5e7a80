"""The passes over a GraphModule: what they put into its graph, and that they take it out again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from graph_modules import SOURCES, X, everything_of, find, nodes_of, traced, train_a_little
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery.converted import WELinear
from we_surgery.converted.graphs import excited_weights
from we_surgery.excitations import Composition
from we_surgery.fx import ExcitePass, StripPass


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_an_excited_graph_trains_and_strips_to_the_graph_it_was(make: Callable[[], Any]) -> None:
    graph_module = make()
    nodes, code, keys = nodes_of(graph_module), graph_module.code, list(graph_module.state_dict())
    names = [name for name, _ in graph_module.named_parameters()]
    result = ExcitePass(config=EVERYTHING)(graph_module)
    assert isinstance(result, PassResult)
    assert result.graph_module is graph_module
    assert result.modified
    assert len(list(excited_weights(graph_module))) == 5
    graph_module.graph.lint()
    train_a_little(graph_module)
    for name, parameter in graph_module.named_parameters():
        assert parameter.grad is not None, name
    with torch.no_grad():
        trained = graph_module(X)
    assert StripPass(example_inputs=X)(graph_module).modified
    graph_module.graph.lint()
    assert torch.equal(graph_module(X), trained)
    assert nodes_of(graph_module) == nodes
    assert graph_module.code == code
    assert list(graph_module.state_dict()) == keys
    assert [name for name, _ in graph_module.named_parameters()] == names
    assert next(excited_weights(graph_module), None) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.mobilenet_v2(num_classes=10),
        lambda: timm.create_model("convnext_atto", num_classes=10),
        ConvNet,
    ],
    ids=["resnet18", "mobilenet_v2", "convnext_atto", "toy"],
)
def test_a_traced_network_gets_what_the_network_itself_gets(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    rows = {row.layer: row.excitation for row in ws.plan(model).decisions}
    graph_module = fx.symbolic_trace(model)
    nodes, keys = nodes_of(graph_module), list(graph_module.state_dict())
    plan = ws.plan(graph_module)
    assert {row.layer: row.excitation for row in plan.decisions} == rows
    assert ExcitePass()(graph_module).modified
    assert nodes_of(graph_module) == nodes  # layers change their class, not the graph
    excited = {name for name, stages in rows.items() if stages}
    assert {weight.module for weight in excited_weights(graph_module)} == excited
    graph_module.train()(x).square().mean().backward()
    assert StripPass(example_inputs=x)(graph_module).modified
    assert is_vanilla(graph_module)
    assert nodes_of(graph_module) == nodes
    assert list(graph_module.state_dict()) == keys


def test_a_functional_convnext_has_an_excitation_node_for_each_weight_its_calls_read() -> None:
    model = timm.create_model("convnext_atto", num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    graph_module: Any = torch.export.export(model, (x,)).module()
    rows = {row.layer: row.excitation for row in ws.plan(model).decisions}
    plan = ws.plan(graph_module)
    assert {row.layer: row.excitation for row in plan.decisions} == rows
    assert ExcitePass(plan=plan)(graph_module).modified
    calls = [n for n in graph_module.graph.nodes if n.op == "call_module" and n.args]
    shown = {node.target for node in calls if str(node.target).endswith(".excitation")}
    assert shown == {f"{name}.excitation" for name, stages in rows.items() if stages}
    StripPass(example_inputs=x)(graph_module)
    assert list(graph_module.state_dict()) == list(model.state_dict())


def test_the_graph_shows_the_raw_weight_then_its_excitation_then_the_call() -> None:
    graph_module = traced()
    ExcitePass()(graph_module)
    (excitation,) = find(graph_module, "stem_excitation")
    (raw,) = excitation.args
    assert (raw.op, raw.target) == ("get_attr", "raw_stem_weight")
    assert excitation.op == "call_module"
    assert isinstance(graph_module.stem_excitation, Composition)
    (user,) = excitation.users
    assert user.target is torch.conv2d
    assert user.prev is excitation
    assert list(find(graph_module, "up.excitation")[0].args[0].users) == [
        *find(graph_module, "up.excitation")
    ]


def test_the_excited_graph_computes_with_the_excited_weights() -> None:
    graph_module = traced().eval()
    vanilla = copy.deepcopy(graph_module)
    ExcitePass(config=EVERYTHING)(graph_module)
    for name, weight in {
        "stem_weight": graph_module.stem_excitation(graph_module.raw_stem_weight),
        "twice": graph_module.twice_excitation(graph_module.raw_twice),
        "depthwise": graph_module.depthwise_excitation(graph_module.raw_depthwise),
    }.items():
        setattr(vanilla, name, nn.Parameter(weight))
    vanilla.up.weight = nn.Parameter(graph_module.up.excitation(graph_module.up.raw_weight))
    vanilla.head.weight = nn.Parameter(graph_module.head.weight)
    assert torch.equal(graph_module(X), vanilla(X))


def test_functional_weights_fall_under_the_same_policy_as_layers() -> None:
    rows = {row.layer: row for row in ws.plan(traced()).decisions}
    assert list(rows) == ["stem_weight", "twice", "depthwise", "up", "head"]
    assert rows["stem_weight"].stages == ("standardize", "lwe")
    assert "'norm' follows" in rows["stem_weight"].reason
    assert rows["twice"].stages == ("lwe",)
    assert rows["depthwise"].reason == "depthwise: one input channel a group"
    assert (rows["up"].kind, rows["up"].groups) == ("conv_transpose2d", 2)
    assert rows["head"].stages == ("mwe",)


def test_rules_name_functional_weights() -> None:
    graph_module = traced()
    rules = [ws.Rule("stem_*", "mwe", standardize="off"), ws.Rule("up", "skip")]
    ExcitePass("lwe", rules=rules)(graph_module)
    stages = {
        (w.module, w.parameter): [stage.name for stage in w.excitation.stages]
        for w in excited_weights(graph_module)
    }
    assert stages == {
        ("", "stem_weight"): ["mwe"],
        ("", "twice"): ["lwe"],
        ("head", "weight"): ["mwe"],
    }


def test_a_weight_that_several_calls_read_is_excited_once() -> None:
    graph_module = traced()
    ExcitePass()(graph_module)
    (excitation,) = find(graph_module, "twice_excitation")
    assert len(excitation.users) == 2


def test_a_weight_that_several_nodes_fetch_is_excited_once() -> None:
    root, graph = nn.Module(), fx.Graph()
    root.w = nn.Parameter(torch.randn(3, 3))
    x = graph.placeholder("x")
    for _ in range(2):
        x = graph.call_function(F.linear, (x, graph.create_node("get_attr", "w")))
    graph.output(x)
    graph_module, x = fx.GraphModule(root, graph), torch.randn(2, 3)
    nodes, code = nodes_of(graph_module), graph_module.code
    ExcitePass()(graph_module)
    assert len(find(graph_module, "raw_w")) == 2
    assert len(find(graph_module, "w_excitation")) == 1
    StripPass(example_inputs=x)(graph_module)
    assert (nodes_of(graph_module), graph_module.code) == (nodes, code)


def test_a_layer_that_the_graph_also_reads_past_itself_is_shown_in_the_graph() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight.t())

    graph_module, x = fx.symbolic_trace(Shared()), torch.randn(2, 4)
    nodes, code = nodes_of(graph_module), graph_module.code
    ExcitePass(example_inputs=x)(graph_module)
    assert isinstance(graph_module.fc, WELinear)
    assert ("get_attr", "fc.raw_weight") in nodes_of(graph_module)
    assert ("call_module", "fc.excitation") in nodes_of(graph_module)
    graph_module.graph.lint()
    StripPass(example_inputs=x)(graph_module)
    assert (nodes_of(graph_module), graph_module.code) == (nodes, code)


def test_tied_weights_share_one_excitation() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("a.weight", "b.weight"):
        x = graph.call_function(F.linear, (x, graph.create_node("get_attr", name)))
    graph.output(x)
    weight = nn.Parameter(torch.randn(3, 3))
    graph_module = fx.GraphModule({"a.weight": weight, "b.weight": weight}, graph)
    nodes, x = nodes_of(graph_module), torch.randn(2, 3)
    converted: Any = ws.convert(graph_module, example_inputs=x)
    assert converted.a.excitation is converted.b.excitation
    assert converted.a.raw_weight is converted.b.raw_weight
    stripped: Any = ws.strip(converted, example_inputs=x)
    assert stripped.a.weight is stripped.b.weight
    assert nodes_of(stripped) == nodes


def test_weights_tied_to_an_embedding_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.table(index))

    index = torch.tensor([[1, 2]])
    for graph_module in (fx.symbolic_trace(Tied()), torch.export.export(Tied(), (index,)).module()):
        before = everything_of(graph_module)
        assert not ExcitePass()(graph_module).modified
        assert everything_of(graph_module) == before


def test_nothing_to_do_is_reported_as_not_modified() -> None:
    graph_module = traced()
    before = everything_of(graph_module)
    assert not StripPass()(graph_module).modified
    assert not ExcitePass(rules=[ws.Rule("*", "skip")])(graph_module).modified
    assert everything_of(graph_module) == before
    ExcitePass()(graph_module)
    before = everything_of(graph_module)
    assert not ExcitePass("mwe")(graph_module).modified
    assert everything_of(graph_module) == before


def test_the_passes_stand_in_a_pass_manager() -> None:
    def rename_output(graph_module: fx.GraphModule) -> PassResult:
        for node in graph_module.graph.nodes:
            node.meta["seen"] = True
        return PassResult(graph_module, True)

    def lint(graph_module: nn.Module) -> None:
        assert isinstance(graph_module, fx.GraphModule)
        graph_module.graph.lint()

    graph_module = traced()
    nodes = nodes_of(graph_module)
    manager = PassManager(
        [rename_output, ExcitePass(example_inputs=X)], run_checks_after_each_pass=True, steps=2
    )
    manager.add_checks(lint)
    result = manager(graph_module)
    assert result.graph_module is graph_module
    assert len(find(graph_module, "stem_excitation")) == 1
    train_a_little(graph_module)
    assert PassManager([StripPass(example_inputs=X), rename_output])(graph_module).modified
    assert nodes_of(graph_module) == nodes
