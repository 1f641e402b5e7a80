"""Which operations read which weights: one pass over the graph of any reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from we_surgery._util.scripted import own_parameters
from we_surgery.excitations import Composition
from we_surgery.reading.graph import (
    EXCITATION,
    MODULE,
    NO_GRADIENT,
    SHAPE,
    ModelGraph,
    called_name,
    is_view,
    join,
    operation_name,
    sources,
    written_by,
)
from we_surgery.reading.kinds import kind_of, weights_of

Place = tuple[int, str]
"""Where an operation takes an argument: its position, and its keyword."""
Operands = tuple[tuple[Place, Place], ...]
"""Where an operation takes its data and its weight."""


def _product(first: Place, second: Place) -> Operands:
    """Either factor may be the weight."""
    return (first, second), (second, first)


_CONVS = frozenset(
    """
    convolution conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d
    """.split()
)
_LAYER: Operands = (((0, "input"), (1, "weight")),)
_OPERANDS: dict[str, Operands] = {
    **dict.fromkeys(_CONVS, _LAYER),
    "linear": _LAYER,
    "mm": _product((0, "input"), (1, "mat2")),
    "bmm": _product((0, "input"), (1, "mat2")),
    "matmul": _product((0, "input"), (1, "other")),
    "mv": (((1, "vec"), (0, "input")),),
    "addmm": _product((1, "mat1"), (2, "mat2")),
    "baddbmm": _product((1, "batch1"), (2, "batch2")),
    "nativemultiheadattention": (
        ((0, "query"), (5, "qkv_weight")),
        ((0, "query"), (7, "proj_weight")),
    ),
    "transformerencoderlayerfwd": (
        ((0, "src"), (3, "qkv_weight")),
        ((0, "src"), (5, "proj_weight")),
        ((0, "src"), (14, "ffn_weight_1")),
        ((0, "src"), (16, "ffn_weight_2")),
    ),
}
# Operations that take the weight as the layer stores it, not transposed.
_AS_STORED = _CONVS | {"linear", "nativemultiheadattention", "transformerencoderlayerfwd"}
_TRANSPOSES = frozenset("t mt transpose permute numpyt swapaxes swapdims".split())
# Views with their own memory: writes do not reach the viewed tensor.
_COPIES = frozenset(["aten.clone", "aten._to_copy", "aten.contiguous", "aten.lift_fresh"])


@dataclass(frozen=True)
class WeightRead:
    """One read of a parameter as the weight of a conv, linear or attention operation.

    Attributes:
        parameter: the parameter's qualified name in the model.
        graph: where it was found.
        node: the operation.
        data: the other operand; None if unknown.
        reader: the innermost running module.
        is_conv: the operation is a conv, not a matrix product.
        filters_first: the parameter's first axis is the filters', as in ``F.linear(x, W)`` and
            ``W @ x``, but not in ``x @ W``.
        computed: the parameter passes through arithmetic first, as in ``StdConv2d``.
        constant_input: ``data`` does not depend on the graph's input.
        no_gradient: gradients are off in train mode.
        transposed: the operation is a transposed conv.
        groups: the conv's groups, otherwise 1.
    """

    parameter: str
    graph: ModelGraph = field(repr=False, compare=False)
    node: fx.Node
    data: fx.Node | None
    reader: str
    is_conv: bool
    filters_first: bool = True
    computed: bool = False
    constant_input: bool = False
    no_gradient: bool = False
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class _Origin:
    """A parameter or buffer that a tensor is made from."""

    name: str
    transposes: int
    computed: bool


def weight_reads(graph: ModelGraph) -> Iterator[WeightRead]:
    """The reads of parameters and buffers as weights, in the order of execution."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            yield from _reads_of_layer(node, graph)
        for data, weight in _OPERANDS.get(called_name(node), ()):
            yield from _reads_of_operation(node, data, weight, graph)


def _reads_of_layer(node: fx.Node, graph: ModelGraph) -> Iterator[WeightRead]:
    module = graph.modules.get(str(node.target))
    kind = None if module is None else kind_of(module)
    if module is None or kind is None:
        return
    name = graph.full_name(str(node.target))
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    for parameter in weights_of(module, kind):
        yield WeightRead(
            parameter=join(name, parameter),
            graph=graph,
            node=node,
            data=operands[0] if operands else None,
            reader=name,
            is_conv=kind.startswith("conv"),
            constant_input=node not in graph.fed,
        )


def _reads_of_operation(
    node: fx.Node, data_place: Place, weight_place: Place, graph: ModelGraph
) -> Iterator[WeightRead]:
    data, weight = _argument(node, data_place), _argument(node, weight_place)
    if not isinstance(weight, fx.Node) or weight in graph.fed:
        return
    name = called_name(node)
    is_conv = name in _CONVS
    groups: Any = 1
    transposed: Any = False
    if name == "convolution":
        groups = _argument(node, (8, "groups"))
        transposed = _argument(node, (6, "transposed"))
    elif is_conv:
        groups = _argument(node, (6, "groups"), 1)
        transposed = "transpose" in name
    if not isinstance(groups, int):  # it is computed in a traced graph
        return
    is_constant = isinstance(data, fx.Node) and data not in graph.fed
    # In W @ x the filters are W's rows, in x @ W its columns.
    is_left = weight_place[0] < data_place[0]
    for origin in _origins(weight, graph):
        is_turned = origin.transposes % 2 == 1
        stored = name in _AS_STORED or is_turned is not is_left
        # If no operand depends on the input, only the form of F.linear shows which is the weight.
        if is_constant and (is_left or not stored):
            continue
        yield WeightRead(
            parameter=graph.full_name(origin.name),
            graph=graph,
            node=node,
            data=data if isinstance(data, fx.Node) else None,
            reader=graph.full_name(graph.runner(node)),
            is_conv=is_conv,
            filters_first=stored,
            computed=origin.computed,
            constant_input=is_constant,
            no_gradient=bool(node.meta.get(NO_GRADIENT)),
            transposed=bool(transposed),
            groups=groups,
        )


def _argument(node: fx.Node, place: Place, default: Any = None) -> Any:
    index, name = place
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _origins(node: fx.Node, graph: ModelGraph) -> Sequence[_Origin]:
    """The parameters and buffers that ``node``, which no input feeds, is made from."""
    found: dict[str, _Origin] = {}
    pending: list[tuple[fx.Node, int, bool]] = [(node, 0, False)]
    seen: set[fx.Node] = set()
    while pending:
        current, transposes, computed = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            name = str(current.target)
            found.setdefault(name, _Origin(name, transposes, computed))
        elif is_view(current):
            source = current.all_input_nodes[0]
            pending.append((source, transposes + _is_turned(current, source), computed))
        else:
            computes = computed or not _excites(current, graph)
            pending.extend((source, transposes, computes) for source in current.all_input_nodes)
    return list(found.values())


def _excites(node: fx.Node, graph: ModelGraph) -> bool:
    is_call = node.op == "call_module" and isinstance(graph.module_of(node), Composition)
    return is_call or bool(node.meta.get(EXCITATION))


def _is_turned(node: fx.Node, source: fx.Node) -> bool:
    """Whether a view swaps the two axes of a matrix.

    Axes of length 1, which an einsum adds, do not count. If the other axes are not two, any
    permutation counts. Without a shape the tensor counts as a matrix.
    """
    name = called_name(node)
    if name not in _TRANSPOSES:
        return False
    shape = source.meta.get(SHAPE)
    rank = 2 if shape is None else len(shape)
    axes: Any = [*node.args[1:], *node.kwargs.values()]
    if len(axes) == 1 and isinstance(axes[0], tuple | list):
        axes = axes[0]
    order = list(range(rank))
    if name in ("t", "mt", "numpyt"):
        order.reverse()
    elif not all(isinstance(axis, int) for axis in axes):
        return False
    elif name == "permute":
        order = [axis % rank for axis in axes]
    else:
        first, second = (axis % rank for axis in axes[:2])
        order[first], order[second] = second, first
    long = [axis for axis in order if shape is None or shape[axis] > 1]
    return long != sorted(long) if len(long) == 2 else order != sorted(order)


def written_weights(graph: ModelGraph) -> dict[str, str]:
    """The parameters, or results of excitations, that the forward writes to, with the writer."""
    written: dict[str, str] = {}
    for node in graph.graph.nodes:
        for origin in written_by(node):
            while is_view(origin) and operation_name(origin) not in _COPIES:
                origin = origin.all_input_nodes[0]
            writer = graph.full_name(graph.runner(node))
            if origin.op == "get_attr":
                written.setdefault(graph.full_name(str(origin.target)), writer)
            elif origin.meta.get(EXCITATION):
                written.setdefault(origin.meta[MODULE], writer)
    return written


def other_readers(graph: ModelGraph, reads: Mapping[fx.Node, set[str]]) -> dict[str, str]:
    """The parameters that other operations read than those in ``reads``, with the first one's name.

    ``reads`` are the parameters that each node of :func:`weight_reads` takes as weights.
    """
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and _runs_unseen(node, graph):
            for own in own_parameters(graph.modules[str(node.target)]):
                name = graph.full_name(join(str(node.target), own))
                found.setdefault(name, graph.describe(node))
        if node.op != "get_attr":
            continue
        name = graph.full_name(str(node.target))
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            for user in current.users:
                if user in seen or current not in sources(user) or user not in graph.live:
                    continue
                if name in reads.get(user, ()):
                    continue
                if is_view(user) or _excites(user, graph):
                    seen.add(user)
                    pending.append(user)
                else:
                    found.setdefault(name, graph.describe(user))
    return found


def _runs_unseen(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether the node calls a module whose forward, which may read its weights, is in no graph."""
    module = graph.module_of(node)
    return module is not None and not isinstance(module, fx.GraphModule | Composition)
