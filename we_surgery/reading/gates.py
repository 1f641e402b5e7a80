"""Which conv and linear operations make an attention gate, by what the data does.

A gate squeezes a feature map, passes the result through a bounded activation, and multiplies the
very map it was made from, and from nothing else: SE, CBAM, ECA, BAM, coordinate attention and
their kin, whatever their classes are called. ``x * sigmoid(x)`` is none, because what feeds the
sigmoid is the map itself; nor is a gated linear unit, whose gate multiplies another map than the
one it is made from; nor the update gate of a recurrent cell, which also sees the cell's input.
"""

from __future__ import annotations

from torch import fx

from we_surgery.reading.recorded import Recording
from we_surgery.reading.recorder import MODULE
from we_surgery.reading.weight_use import fed_by_input, is_view, operation_name

_BOUNDED = frozenset(
    "aten.sigmoid aten.sigmoid_ aten.hardsigmoid aten.hardsigmoid_ aten._softmax aten.tanh "
    "aten.tanh_ aten.hardtanh aten.hardtanh_ aten.clamp".split()
)
# Between the activation and the product a gate may be resized, scaled or offset.
_ADJUSTMENTS = frozenset(
    "aten.upsample_nearest2d aten.upsample_bilinear2d aten.add aten.sub aten.rsub aten.div "
    "aten.mul aten.div_ aten.mul_ aten.add_".split()
)
_PRODUCTS = ("aten.mul", "aten.mul_")


def gate_operations(recording: Recording, fed: set[fx.Node] | None = None) -> dict[fx.Node, str]:
    """The operations inside gates, each with the module in which the gate is applied.

    Args:
        recording: a recorded forward.
        fed: the nodes that depend on the model's input, where they are known already.
    """
    fed = fed_by_input(recording.graph) if fed is None else fed
    order = {node: index for index, node in enumerate(recording.graph.nodes)}
    found: dict[fx.Node, str] = {}
    for node in recording.graph.nodes:
        if operation_name(node) not in _PRODUCTS:
            continue
        operands = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        if len(operands) < 2 or not all(operand in fed for operand in operands):
            continue
        for gate, gated in (operands, operands[::-1]):
            activation = _bounded_activation(gate, fed)
            if activation is None:
                continue
            for source in _gated_maps(gated, fed):
                inside = _between(source, activation, fed, order)
                if inside:
                    for operation in inside:
                        found.setdefault(operation, node.meta[MODULE])
                    break
    return found


def _bounded_activation(node: fx.Node, fed: set[fx.Node]) -> fx.Node | None:
    """The bounded activation that ``node`` is an adjusted view of, or None."""
    while node.op == "call_function":
        name = operation_name(node)
        if name in _BOUNDED:
            return node
        sources = [source for source in node.all_input_nodes if source in fed]
        if not (is_view(node) or name in _ADJUSTMENTS) or len(sources) != 1:
            return None
        node = sources[0]
    return None


def _gated_maps(node: fx.Node, fed: set[fx.Node]) -> list[fx.Node]:
    """``node`` behind its views, and what it was before other gates multiplied it."""
    while is_view(node):
        node = node.all_input_nodes[0]
    maps = [node]
    if operation_name(node) in _PRODUCTS:
        operands = [source for source in node.args[:2] if isinstance(source, fx.Node)]
        for gate, gated in (operands, operands[::-1]) if len(operands) == 2 else ():
            if _bounded_activation(gate, fed) is not None:
                maps += _gated_maps(gated, fed)
    return maps


def _between(
    source: fx.Node, target: fx.Node, fed: set[fx.Node], order: dict[fx.Node, int]
) -> set[fx.Node]:
    """The operations that make ``target`` from ``source``; none if anything else feeds it.

    What depends on the input and stands before ``source`` cannot have been made from it.
    """
    inside: set[fx.Node] = set()
    pending = [n for n in target.all_input_nodes if n in fed]
    reached = False
    while pending:
        current = pending.pop()
        if current is source:
            reached = True
        elif order[current] < order[source]:
            return set()
        elif current not in inside:
            inside.add(current)
            pending.extend(n for n in current.all_input_nodes if n in fed)
    return inside if reached else set()
