"""Shift-fed layers in a symbolically traced graph, which has no shapes.

The nodes between a layer and the layers before it are cut out and recorded on made-up inputs, with
the layers' channels and small other dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from we_surgery.excitations import WeightLayout
from we_surgery.reading.displacement import Shift
from we_surgery.reading.fakes import Fakes
from we_surgery.reading.graph import ModelGraph
from we_surgery.reading.recorded import record, uncollected
from we_surgery.reading.shifts import shift_before

_LARGEST_SLICE = 200
# Without channels; several per kind, since a reshape may need a number of segments or tokens.
_MADE_UP_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "conv1d": ((16, 12),),
    "conv2d": ((16, 6, 7), (24, 6, 6), (30, 6, 6)),
    "conv3d": ((2, 4, 5, 6),),
    "linear": ((2, 6, 7), (2, 42), (16,)),
}
_CHANNELS = ("out_channels", "out_features", "num_features")
_DISPLACING = ("roll", "pad", "getitem", "narrow", "chunk", "split", "gather", "slice", "select")
_JOINING = ("cat", "stack", "concat", "gather", "setitem", "copy", "indexselect", "scatter")


def traced_shift_before(
    data: fx.Node, kind: str, layout: WeightLayout, graph: ModelGraph
) -> Shift | None:
    """The shift that made a layer's input, on the first made-up shapes that run."""
    if kind not in _MADE_UP_SHAPES:
        return None
    inside, sources = _between_layers(data, graph)
    if not _may_shift(inside, graph):
        return None
    is_conv = kind.startswith("conv")
    channels = [_channels_after(source, graph) or layout.in_channels for source in sources]
    cut = _cut_out(graph, inside, sources, data)
    for sizes in _MADE_UP_SHAPES[kind]:
        shapes = [(sizes[0], c, *sizes[1:]) if is_conv else (*sizes, c) for c in channels]
        with uncollected(), Fakes() as fakes:
            recording = _recorded(cut, [torch.zeros(shape) for shape in shapes], fakes)
        if recording is not None:
            (output,) = (node for node in recording.graph.nodes if node.op == "output")
            (result,) = output.all_input_nodes
            return shift_before(result, 1 if is_conv else -1, recording)
    raise RuntimeError("it runs on none of the shapes")


def _recorded(cut: nn.Module, inputs: Sequence[Tensor], fakes: Fakes) -> ModelGraph | None:
    try:
        return record(cut, inputs, fakes=fakes)
    except Exception:
        return None


def _between_layers(node: fx.Node, graph: ModelGraph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between ``node`` and its source layers and inputs, and these sources."""
    inside: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    pending = [node]
    while pending and len(inside) < _LARGEST_SLICE:
        current = pending.pop()
        if current in inside or current in sources:
            continue
        if current.op == "placeholder" or _ends_slice(current, graph):
            sources.add(current)
        else:
            inside.add(current)
            pending.extend(current.all_input_nodes)
    return sorted(inside, key=graph.order.__getitem__), sorted(sources, key=graph.order.__getitem__)


def _ends_slice(node: fx.Node, graph: ModelGraph) -> bool:
    """Whether the node is or holds a trained layer."""
    return graph.layers_in(node) > 0 and any(p.requires_grad for p in _parameters(node, graph))


def _parameters(node: fx.Node, graph: ModelGraph) -> list[nn.Parameter]:
    """The parameters of the module that the node calls, or those that it takes itself."""
    if node.op == "call_module":
        return list(graph.modules[str(node.target)].parameters())
    values = [graph.value(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [value for value in values if isinstance(value, nn.Parameter)]


def _may_shift(inside: Sequence[fx.Node], graph: ModelGraph) -> bool:
    names = [graph.operation(node) for node in inside]
    displaces = any(word in name for name in names for word in _DISPLACING)
    joins = any(word in name for name in names for word in _JOINING)
    has_fixed_layers = any(graph.layers_in(node) for node in inside)
    indexed = any(
        node.target is operator.getitem and any(source in inside for source in _indices(node))
        for node in inside
    )
    return (displaces and joins) or has_fixed_layers or indexed


def _indices(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args[1], found.append)
    return found


class _Cut(nn.Module):
    """A piece of a traced model, run node by node.

    Not a ``GraphModule``: its generated code would contain the modules' names, which may be any
    text if they come from a file.
    """

    def __init__(self, parts: dict[str, nn.Module | Tensor], graph: fx.Graph) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.graph = graph

    def forward(self, *sources: Tensor) -> Any:
        return fx.Interpreter(self, graph=self.graph).run(*sources)


def _cut_out(
    whole: ModelGraph, inside: Sequence[fx.Node], sources: Sequence[fx.Node], data: fx.Node
) -> _Cut:
    """The nodes ``inside`` as a module from ``sources`` to ``data``."""
    graph = fx.Graph()
    copies = {source: graph.placeholder(f"source_{i}") for i, source in enumerate(sources)}
    names: dict[str, str] = {}
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            copies[node].target = names.setdefault(str(node.target), f"part_{len(names)}")
    graph.output(copies[data])
    return _Cut({name: whole.value(target) for target, name in names.items()}, graph)


def _channels_after(node: fx.Node, graph: ModelGraph) -> int | None:
    if node.op == "placeholder":
        return None
    if node.op != "call_module":
        return next(len(weight) for weight in _parameters(node, graph))
    module = graph.modules[str(node.target)]
    channels = [getattr(module, name, None) for name in _CHANNELS]
    return next((value for value in channels if isinstance(value, int)), None)
