"""Which parameters the calls of a GraphModule take as weights, and what is known of them."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import we_surgery as ws
from we_surgery.planning.rows import Decision
from we_surgery.reading import LayerFacts, read_tree


def facts_of(graph_module: nn.Module) -> dict[str, LayerFacts]:
    return {facts.path: facts for facts in read_tree(graph_module)}


def graph_reading(
    shape: tuple[int, ...], call: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]
) -> fx.GraphModule:
    """A graph that applies one call to its input and a parameter called ``w``."""
    root, graph = nn.Module(), fx.Graph()
    root.w = nn.Parameter(torch.randn(shape))
    x, w = graph.placeholder("x"), graph.create_node("get_attr", "w")
    graph.output(call(graph, x, w))
    return fx.GraphModule(root, graph)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.depthwise = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.up = nn.Parameter(torch.randn(8, 3, 2, 2))
        self.fc = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.stem, padding=1)
        x = F.relu(F.batch_norm(x, None, None, training=True))
        x = F.relu(F.conv2d(x, weight=self.depthwise, padding=1, groups=8))
        x = F.conv_transpose2d(x, self.up, None, 2, 0, 0, 2)
        return F.linear(x.mean((2, 3)), self.fc)


@pytest.mark.parametrize("form", ["traced", "exported", "decomposed", "make_fx"])
def test_weights_read_by_calls_have_the_facts_of_layers(form: str) -> None:
    model, x = Functional(), torch.randn(2, 3, 8, 8)
    if form == "traced":
        graph_module: nn.Module = fx.symbolic_trace(model)
    elif form == "make_fx":
        graph_module = make_fx(model)(x)
    else:
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if form == "decomposed" else program
        graph_module = program.module()
    found = [
        (facts.kind, facts.layout.shape, facts.layout.groups, facts.followed_by_norm)
        for facts in read_tree(graph_module)
    ]
    assert sorted(found) == [
        ("conv2d", (8, 1, 3, 3), 8, False),
        ("conv2d", (8, 3, 3, 3), 1, True),
        ("conv_transpose2d", (8, 3, 2, 2), 2, False),
        ("linear", (5, 6), 1, False),
    ]
    assert all(facts.obstacle is None for facts in read_tree(graph_module))


FUNCTIONS = {
    "conv1d": (F.conv1d, (4, 3, 5), "conv1d"),
    "conv2d": (F.conv2d, (4, 3, 5, 5), "conv2d"),
    "conv3d": (F.conv3d, (4, 3, 2, 2, 2), "conv3d"),
    "conv_transpose1d": (F.conv_transpose1d, (3, 4, 5), "conv_transpose1d"),
    "conv_transpose2d": (F.conv_transpose2d, (3, 4, 5, 5), "conv_transpose2d"),
    "conv_transpose3d": (F.conv_transpose3d, (3, 4, 2, 2, 2), "conv_transpose3d"),
    "linear": (F.linear, (4, 3), "linear"),
    "aten.conv2d": (torch.ops.aten.conv2d.default, (4, 3, 5, 5), "conv2d"),
    "aten.conv2d packet": (torch.ops.aten.conv2d, (4, 3, 5, 5), "conv2d"),
    "aten.linear": (torch.ops.aten.linear.default, (4, 3), "linear"),
}


@pytest.mark.parametrize(("function", "shape", "kind"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_each_function_is_known(
    function: Callable[..., Tensor], shape: tuple[int, ...], kind: str
) -> None:
    graph_module = graph_reading(shape, lambda graph, x, w: graph.call_function(function, (x, w)))
    (facts,) = read_tree(graph_module)
    assert (facts.path, facts.kind, facts.layout.shape) == ("w", kind, shape)
    assert facts.layout.transposed == ("transpose" in kind)
    assert facts.obstacle is None


TRANSPOSITIONS: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "aten.t": lambda graph, w: graph.call_function(torch.ops.aten.t.default, (w,)),
    "aten.transpose": lambda graph, w: graph.call_function(
        torch.ops.aten.transpose.int, (w, -1, 0)
    ),
    "aten.permute": lambda graph, w: graph.call_function(
        torch.ops.aten.permute.default, (w, [1, 0])
    ),
    "torch.t": lambda graph, w: graph.call_function(torch.t, (w,)),
    "method t": lambda graph, w: graph.call_method("t", (w,)),
    "method permute": lambda graph, w: graph.call_method("permute", (w, 1, 0)),
    "T": lambda graph, w: graph.call_function(getattr, (w, "T")),
}


@pytest.mark.parametrize("transpose", TRANSPOSITIONS.values(), ids=TRANSPOSITIONS)
@pytest.mark.parametrize("product", [torch.ops.aten.mm.default, operator.matmul, torch.matmul])
def test_a_product_with_a_transposed_weight_is_a_linear_call(
    transpose: Callable[[fx.Graph, fx.Node], fx.Node], product: Callable[..., Tensor]
) -> None:
    graph_module = graph_reading(
        (4, 3), lambda graph, x, w: graph.call_function(product, (x, transpose(graph, w)))
    )
    (facts,) = read_tree(graph_module)
    assert (facts.kind, facts.layout.shape, facts.obstacle) == ("linear", (4, 3), None)


PRODUCTS: dict[str, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]] = {
    "x @ W": lambda graph, x, w: graph.call_function(torch.matmul, (x, w)),
    "W.T @ x": lambda graph, x, w: graph.call_function(torch.mm, (graph.call_method("t", (w,)), x)),
    "x @ permute(W, 0, 1)": lambda graph, x, w: graph.call_function(
        torch.mm, (x, graph.call_method("permute", (w, 0, 1)))
    ),
}


@pytest.mark.parametrize("call", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_whose_filters_come_last_is_excited_in_the_attached_form_alone(
    call: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node],
) -> None:
    (facts,) = read_tree(graph_reading((3, 3), call))
    assert (facts.kind, facts.obstacle) == ("linear_transpose", None)
    assert "x @ W" in str(facts.obstacle_for("converted"))


def test_a_weight_that_is_scaled_first_is_left_alone() -> None:
    def call(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        return graph.call_function(F.linear, (x, graph.call_function(operator.mul, (w, 2))))

    (facts,) = read_tree(graph_reading((3, 3), call))
    assert facts.obstacle == "is one part of a weight that its module computes"


NOT_WEIGHTS: dict[str, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]] = {
    "added": lambda graph, x, w: graph.call_function(operator.add, (x, w)),
    "the data": lambda graph, x, w: graph.call_function(F.linear, (w, x)),
}


@pytest.mark.parametrize("call", NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
def test_a_parameter_that_is_used_in_another_way_is_no_weight(
    call: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node],
) -> None:
    assert read_tree(graph_reading((3, 3), call)) == []


def test_a_weight_that_something_else_reads_too_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 4))

        def forward(self, index: Tensor) -> Tensor:
            return F.linear(F.embedding(index, self.table), self.table)

    (row,) = ws.plan(fx.symbolic_trace(Tied())).decisions
    assert not row.excitation
    assert row.reason == "is also read by embedding, which is not a conv or linear call"


def test_calls_that_read_a_weight_in_two_ways_leave_it_alone() -> None:
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, self.w), self.w, groups=2)

    (row,) = ws.plan(fx.symbolic_trace(Regrouped())).decisions
    assert row.reason == "is read in different ways by 'conv2d' and 'conv2d_1'"


def test_a_question_about_a_weights_shape_is_no_read() -> None:
    def call(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        graph.call_function(getattr, (w, "shape"))
        graph.call_method("size", (w, 0))
        return graph.call_function(F.linear, (x, w))

    assert facts_of(graph_reading((4, 3), call))["w"].obstacle is None


def test_buffers_vectors_and_frozen_weights_are_not_excited() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 3, 1, 1))
            self.frozen = nn.Parameter(torch.randn(3, 3, 1, 1), requires_grad=False)
            self.vector = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.conv2d(F.conv2d(x, self.kernel), self.frozen), self.vector)

    (row,) = ws.plan(fx.symbolic_trace(Fixed())).decisions
    assert (row.layer, row.reason) == ("frozen", "frozen: its weight does not require a gradient")


def test_a_weight_applied_to_a_constant_is_left_alone() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))
            self.register_buffer("positions", torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.linear(self.positions, self.w)

    (row,) = ws.plan(fx.symbolic_trace(Table())).decisions
    assert row.reason == "applied to a constant alone, such as a table of positions"


def test_two_weights_whose_excitations_would_have_one_name_do_not_both_get_one() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Parameter(torch.randn(3, 3))
            self.fc_weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.fc), self.fc_weight)

    graph_module = fx.symbolic_trace(Clash())
    first, second = ws.plan(graph_module).decisions
    assert first.excitation
    assert not second.excitation
    assert second.reason == "would have an excitation of the same name as 'fc'"
    converted = ws.convert(graph_module)
    assert list(ws.strip(converted).state_dict()) == ["fc", "fc_weight"]


def test_an_excited_graph_lists_its_weights_as_excited() -> None:
    converted = ws.convert(fx.symbolic_trace(Functional()))
    rows = {row.layer: row for row in ws.plan(converted).decisions}
    assert list(rows) == ["stem", "depthwise", "up", "fc"]
    assert [name for name, row in rows.items() if row.reason == "is excited already"] == [
        "stem",
        "up",
        "fc",
    ]


def test_a_recorded_forward_finds_the_gates_and_shifts_of_calls() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze = nn.Parameter(torch.randn(2, 4, 1, 1))
            self.expand = nn.Parameter(torch.randn(4, 2, 1, 1))
            self.after_shift = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), self.squeeze))
            x = x * F.conv2d(hidden, self.expand).sigmoid()
            x = torch.cat([torch.roll(x[:, :2], 1, 3), x[:, 2:]], 1)
            return F.conv2d(x, self.after_shift)

    x = torch.randn(2, 4, 8, 8)
    for graph_module in (fx.symbolic_trace(Gated()), torch.export.export(Gated(), (x,)).module()):
        plan = ws.plan(graph_module, example_inputs=x)
        assert plan.read_by == "recorded"
        rows: dict[str, Decision] = {row.layer: row for row in plan.decisions}
        assert rows["squeeze"].reason.startswith("inside an attention gate")
        assert rows["expand"].reason.startswith("inside an attention gate")
        assert rows["after_shift"].reason.startswith("shift-fed")


def test_two_graphs_that_read_one_weight_count_as_one_layer() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.w))

    inner = fx.symbolic_trace(Holder())
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.create_node("get_attr", "inner.w")
    graph.output(graph.call_function(F.linear, (graph.call_module("inner", (x,)), w)))
    outer = fx.GraphModule({"inner": inner, "inner.w": inner.w}, graph)
    assert [facts.path for facts in read_tree(outer)] == ["inner.w"]
    converted = ws.convert(outer)
    targets = [str(node.target) for m in (converted, converted.inner) for node in m.graph.nodes]
    assert {"inner.raw_w", "inner.w_excitation", "raw_w", "w_excitation"} <= set(targets)
    assert list(converted.state_dict()) == ["inner.raw_w", "inner.w_excitation._extra_state"]
    stripped = ws.strip(converted, example_inputs=torch.randn(2, 4))
    assert list(stripped.state_dict()) == ["inner.w"]
    assert [str(node.target) for node in stripped.graph.nodes] == [
        str(node.target) for node in outer.graph.nodes
    ]
