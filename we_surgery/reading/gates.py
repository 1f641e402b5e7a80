"""Finds the conv and linear operations of attention gates, by dataflow.

A gate computes a factor from a feature map, ends with a bounded activation, and multiplies that
same map: SE, CBAM, ECA, BAM, coordinate attention and others, whatever their class names. An
operation belongs to the gate if nothing but the factor uses it; the main network, from whose deeper
maps a factor may be computed, does not. If several bounded activations are added or multiplied
into one factor, one of them must be computed from the map.

Not gates: ``x * sigmoid(x)``, whose sigmoid sees the map itself; a gated linear unit, which
multiplies another map; the update gate of a recurrent cell, which also sees the cell's input; and a
network that estimates a mask.
"""

from __future__ import annotations

import heapq

from torch import fx

from we_surgery.reading.graph import ModelGraph

_BOUNDED = frozenset(
    """
    sigmoid hardsigmoid softmax softmax2d tanh hardtanh relu6 clamp clip expit
    """.split()
)
# Between the activation and the product a gate may be resized, scaled, offset or combined.
_ADJUSTMENTS = frozenset(
    """
    interpolate upsample upsamplenearest2d upsamplebilinear2d add iadd sub isub rsub div idiv
    truediv itruediv mul imul dropout nativedropout
    """.split()
)
_PRODUCTS = frozenset(["mul", "imul", "multiply"])
_DEEPEST = 4
"""Layers in a row of the deepest gate known, BAM's. A factor that takes more is a network's."""


def gate_operations(graph: ModelGraph) -> dict[fx.Node, str]:
    """The operations inside gates, each with the module in which the gate is applied."""
    found: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        operands = _factors(node, graph)
        for factor, gated in (operands, operands[::-1]) if operands else ():
            activations, factor_nodes = _bounded_activations(factor, graph)
            maps = _gated_maps(gated, graph) if activations else []
            if any(_is_made_from(a, source, graph) for a in activations for source in maps):
                inside = _used_for_nothing_else(activations, factor_nodes, graph)
                if _depth(inside, graph) <= _DEEPEST:
                    for operation in inside:
                        found.setdefault(operation, graph.full_name(graph.runner(node)))
    return found


def gate_reason(module: str) -> str:
    """The gate that a module applies, for the reasons of a plan."""
    return f"multiplies the map it is made from, in {module!r}"


def _factors(node: fx.Node, graph: ModelGraph) -> list[fx.Node]:
    """The two maps that the node multiplies; empty for any other node."""
    if graph.operation(node) not in _PRODUCTS:
        return []
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)][:2]
    return operands if len(operands) == 2 and all(o in graph.fed for o in operands) else []


def _bounded_activations(node: fx.Node, graph: ModelGraph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The bounded activations that ``node`` is made from alone, and the nodes from them on."""
    activations: list[fx.Node] = []
    passed: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in passed:
            continue
        passed.add(current)
        name = graph.operation(current)
        if name in _BOUNDED:
            activations.append(current)
        elif graph.is_view(current) or name in _ADJUSTMENTS:
            pending.extend(graph.fed_sources(current))
        else:
            return [], set()
    return activations, passed


def _gated_maps(node: fx.Node, graph: ModelGraph) -> list[fx.Node]:
    """``node`` behind its views, and what it was before other gates multiplied it."""
    while graph.is_view(node):
        node = node.all_input_nodes[0]
    maps = [node]
    operands = _factors(node, graph)
    for factor, gated in (operands, operands[::-1]) if operands else ():
        if _bounded_activations(factor, graph)[0]:
            maps += _gated_maps(gated, graph)
    return maps


def _is_made_from(target: fx.Node, source: fx.Node, graph: ModelGraph) -> bool:
    """Whether ``target`` is computed from ``source`` alone."""
    seen: set[fx.Node] = set()
    pending = graph.fed_sources(target)
    reached = False
    while pending:
        current = pending.pop()
        if current is source:
            reached = True
        elif current.op == "placeholder" or graph.order[current] < graph.order[source]:
            return False
        elif current not in seen:
            seen.add(current)
            pending.extend(graph.fed_sources(current))
    return reached


def _used_for_nothing_else(
    activations: list[fx.Node], factor_nodes: set[fx.Node], graph: ModelGraph
) -> list[fx.Node]:
    """The nodes that the activations are computed from and only the product uses, in order."""
    inside: list[fx.Node] = []
    allowed = set(factor_nodes)
    pending = [-graph.order[s] for activation in activations for s in graph.fed_sources(activation)]
    heapq.heapify(pending)
    nodes = list(graph.order)
    while pending:
        node = nodes[-heapq.heappop(pending)]
        if node in allowed or node.op == "placeholder":
            continue
        if all(user in allowed for user in graph.consumers(node)):
            inside.append(node)
            allowed.add(node)
            for source in graph.fed_sources(node):
                heapq.heappush(pending, -graph.order[source])
    return inside[::-1]


def _depth(operations: list[fx.Node], graph: ModelGraph) -> float:
    """The most layers that stand in a row among the operations, which are in their order."""
    depths: dict[fx.Node, float] = {}
    for node in operations:
        before = max((depths.get(source, 0) for source in graph.fed_sources(node)), default=0)
        depths[node] = before + graph.layers_in(node)
    return max(depths.values(), default=0)
