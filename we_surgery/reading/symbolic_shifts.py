"""Shift-fed convs on a symbolically traced graph.

Such a graph has no shapes. What lies between a conv and the layers before it is cut out, and
recorded on made-up inputs: channels from the layers, everything else small.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from we_surgery.errors import SurgeryError
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.kinds import WEIGHTED
from we_surgery.reading.recorded import Recording, record, uncollected
from we_surgery.reading.shifts import shift_before
from we_surgery.reading.stand_ins import Fakes
from we_surgery.reading.symbolic import TracedBlock, join

_LARGEST_SLICE = 200
# Without channels; several per kind, since a reshape may want a number of segments or tokens.
_MADE_UP_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "conv1d": ((16, 12),),
    "conv2d": ((16, 6, 7), (24, 6, 6), (30, 6, 6)),
    "conv3d": ((2, 4, 5, 6),),
    "linear": ((2, 6, 7), (2, 42), (16,)),
}
_DISPLACING = ("roll", "pad", "getitem", "narrow", "chunk", "split", "gather", "slice", "select")
_JOINING = ("cat", "stack", "concat", "gather", "setitem", "copy_", "index_select", "scatter")


def mark_shifts(model: nn.Module, block: TracedBlock, layers: list[LayerFacts]) -> None:
    """Sets ``shift``, or ``shift_unknown``, for the layers that the block's graph calls."""
    root = model.get_submodule(block.name)
    modules = dict(root.named_modules())
    by_name = {layer.module: layer for layer in layers if layer.parameter == "weight"}
    for node in block.graph.nodes:
        layer = by_name.get(join(block.name, str(node.target))) if _is_call(node) else None
        if layer is None or layer.kind not in _MADE_UP_SHAPES:
            continue
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        inside, sources = _between_layers(node.args[0], modules)
        if not _may_shift(inside, modules):
            continue
        try:
            cut = _cut_out(root, block, inside, sources, node.args[0])
            found = _find(cut, sources, layer, modules)
        except SurgeryError:
            raise
        except Exception:
            if layer.shift is None:
                layer.shift_unknown = "following its input needs example inputs"
            continue
        layer.shift = found or layer.shift


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def _between_layers(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes between ``node`` and the layers and inputs it comes from, and these."""
    inside: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    pending = [node]
    while pending and len(inside) < _LARGEST_SLICE:
        current = pending.pop()
        if current in inside or current in sources:
            continue
        if current.op == "placeholder" or _ends_slice(current, modules):
            sources.add(current)
        else:
            inside.add(current)
            pending.extend(current.all_input_nodes)
    order = {n: index for index, n in enumerate(node.graph.nodes)}
    return sorted(inside, key=order.__getitem__), sorted(sources, key=order.__getitem__)


def _ends_slice(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not _is_call(node):
        return False
    module = modules[str(node.target)]
    trained = any(parameter.requires_grad for parameter in module.parameters())
    holds_layers = any(isinstance(inner, WEIGHTED) for inner in module.modules())
    return trained and holds_layers


def _may_shift(inside: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    names = [
        type(modules[str(node.target)]).__name__.lower()
        if _is_call(node)
        else str(getattr(node.target, "__name__", node.target))
        for node in inside
        if node.op != "get_attr"  # whose target is a path, of any names
    ]
    displaces = any(word in name for name in names for word in _DISPLACING)
    joins = any(word in name for name in names for word in _JOINING)
    fixed_convs = any(
        _is_call(node) and isinstance(modules[str(node.target)], WEIGHTED) for node in inside
    ) or any("conv" in name for name in names)
    indexed = any(
        node.target is operator.getitem and any(source in inside for source in _indices(node))
        for node in inside
    )
    return (displaces and joins) or fixed_convs or indexed


def _indices(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args[1], found.append)
    return found


class _Cut(nn.Module):
    """A piece of a traced model, run node by node.

    No ``GraphModule``: its generated code would spell out the modules' names, and a name in a
    file can be any text.

    Args:
        parts: what the graph's nodes refer to, by their targets in it.
        graph: the piece; its placeholders are the inputs.
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
    root: nn.Module,
    block: TracedBlock,
    inside: list[fx.Node],
    sources: list[fx.Node],
    data: fx.Node,
) -> _Cut:
    """The nodes ``inside`` as a module from ``sources`` to ``data``."""
    graph = fx.Graph()
    copies = {source: graph.placeholder(f"source_{i}") for i, source in enumerate(sources)}
    parts: dict[str, nn.Module | Tensor] = {}
    part_names: dict[str, str] = {}
    for node in inside:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            if target not in part_names:
                part_names[target] = f"part_{len(parts)}"
                constants = block.constants
                part = constants[target] if target in constants else attrgetter(target)(root)
                parts[part_names[target]] = part
            copy.target = part_names[target]
    graph.output(copies[data])
    return _Cut(parts, graph)


def _find(
    cut: _Cut,
    sources: list[fx.Node],
    layer: LayerFacts,
    modules: dict[str, nn.Module],
) -> str | None:
    """The shift in what ``cut`` returns, on the first made-up shapes that run."""
    channel_dim = 1 if layer.kind.startswith("conv") else -1
    for inputs in _made_up_inputs(sources, layer, modules):
        with uncollected(), Fakes() as fakes:
            recording = _recorded(cut, inputs, fakes)
        if recording is None:
            continue
        (output,) = (node for node in recording.graph.nodes if node.op == "output")
        (result,) = output.all_input_nodes
        shift = shift_before(result, channel_dim, recording, cut)
        return None if shift is None else str(shift)
    raise RuntimeError("it runs on none of the shapes")


def _recorded(cut: _Cut, inputs: list[Tensor], fakes: Fakes) -> Recording | None:
    try:
        return record(cut, inputs, fakes=fakes)
    except Exception:
        return None


def _made_up_inputs(
    sources: list[fx.Node], layer: LayerFacts, modules: dict[str, nn.Module]
) -> Iterator[list[Tensor]]:
    for sizes in _MADE_UP_SHAPES[layer.kind]:
        inputs = []
        for source in sources:
            channels = layer.layout.in_channels
            if _is_call(source):
                channels = _channels_after(modules[str(source.target)]) or channels
            last = not layer.kind.startswith("conv")
            shape = (*sizes, channels) if last else (sizes[0], channels, *sizes[1:])
            inputs.append(torch.zeros(shape))
        yield inputs


def _channels_after(module: nn.Module) -> int | None:
    for name in ("out_channels", "out_features", "num_features"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None
