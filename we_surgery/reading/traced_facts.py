"""What the graphs of a symbolic trace tell about each layer's gate and norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from we_surgery.reading.dataflow import Dataflow
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.gates import gate_operations, gate_reason
from we_surgery.reading.norms import After, after
from we_surgery.reading.symbolic import TracedBlock
from we_surgery.reading.tree import ancestors


def mark_gates_and_norms(
    model: nn.Module, block: TracedBlock, layers: Sequence[LayerFacts]
) -> None:
    """Sets ``gate`` and ``followed_by_norm`` for each layer that the block's graph calls.

    What follows the output of a submodule, or what happens in one that was kept whole, is not
    known from this graph: a layer before it keeps what the order of registration says. What was
    kept whole inside a gate is in it with all of its layers.
    """
    modules = dict(model.get_submodule(block.name).named_modules())
    flow = Dataflow(block.graph, modules, block.name, block.untraceable, block.is_partial)
    calls: dict[str, list[fx.Node]] = {}
    for node in block.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(flow.full_name(str(node.target)), []).append(node)
    applied_in = gate_operations(flow)
    gates = {
        name: applied_in[node]
        for name, nodes in calls.items()
        for node in nodes
        if node in applied_in
    }
    for layer in layers:
        if layer.gate is None:
            names = (layer.module, *ancestors(layer.module))
            gate = next((gates[name] for name in names if name in gates), None)
            layer.gate = None if gate is None else gate_reason(gate)
        if layer.module in calls:
            found = After.all_of(after(node, flow) for node in calls[layer.module])
            if found.is_norm is not None:
                layer.followed_by_norm = found.is_norm
                layer.norm_evidence = found.reason
