"""The passes over a GraphModule: what they put into its graph, and that they take it out again."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from test_surgery import snapshot
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery import grafting, surgery
from we_surgery.excitations import Composition
from we_surgery.fx import ExcitePass, StripPass
from we_surgery.graphs import excited_weights
from we_surgery.layers import WEConv2d, WELinear


class Functional(nn.Module):
    """Weights without layers: plain, depthwise, transposed, used twice, and in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))
        self.stem_weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.depthwise = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.up = nn.Module()
        self.up.weight = nn.Parameter(torch.randn(8, 3, 2, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.conv2d(x, self.stem_weight, self.bias, padding=1)))
        x = F.relu(F.conv2d(x, self.twice, padding=1)) + F.conv2d(x, self.twice, padding=1)
        x = F.relu(F.conv2d(x, self.depthwise, padding=1, groups=8))
        x = F.conv_transpose2d(x, self.up.weight, stride=2, groups=2)
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Functional())


def exported() -> Any:
    return torch.export.export(Functional(), (X,)).module()


def decomposed() -> Any:
    return torch.export.export(Functional().eval(), (X,)).run_decompositions().module()


def dispatched() -> Any:
    return make_fx(Functional().eval())(X)


SOURCES = {"traced": traced, "exported": exported, "decomposed": decomposed, "make_fx": dispatched}


def nodes_of(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


def everything_of(graph_module: fx.GraphModule) -> list[Any]:
    return [nodes_of(graph_module), graph_module.code, snapshot(graph_module)]


def find(graph_module: fx.GraphModule, target: str) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target == target]


def train_a_little(graph_module: nn.Module) -> None:
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        graph_module(X).square().mean().backward()
        optimizer.step()


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
    excited = {name for name, recipe in rows.items() if recipe}
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
    assert shown == {f"{name}.excitation" for name, recipe in rows.items() if recipe}
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


@pytest.mark.parametrize(("at", "fails_at"), [("hold", 3), ("excite", 1), ("update_graphs", 1)])
def test_a_failure_halfway_leaves_the_graph_as_it_was(
    at: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(grafting, at), []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("no more")
        real(*arguments)

    graph_module = traced()
    before = everything_of(graph_module)
    monkeypatch.setattr(grafting, at, failing)
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
    monkeypatch.setattr(surgery, "check_outputs", refuse)
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
        "raw_excitation.mwe.epsilon",
        "weight",
    }
    StripPass(example_inputs=torch.randn(2, 3))(graph_module)
    assert nodes_of(graph_module) == nodes
