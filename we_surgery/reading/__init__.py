"""A model -> torch.fx graphs -> facts about its layers. The model is never changed.

Lives here: three readings (``recorded``, ``symbolic``, ``tree``) that build the same kind of graph
(``graph``), and one pass over it per fact: ``weights``, ``norms``, ``gates``, ``shifts``;
``passes`` writes their results into the ``facts`` of each layer. May import: ``excitations``,
``_util``, ``errors``. To add a fact: a field in ``facts``, a pass over ``ModelGraph``, a line in
``passes``.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from we_surgery._util.copies import drawing_nothing
from we_surgery.reading.facts import Form as Form
from we_surgery.reading.facts import LayerFacts as LayerFacts
from we_surgery.reading.facts import Reading as Reading
from we_surgery.reading.facts import layer_display_name as layer_display_name
from we_surgery.reading.graph import ModelGraph
from we_surgery.reading.namespaces import put_back
from we_surgery.reading.obstacles import converted_obstacle_of as converted_obstacle_of
from we_surgery.reading.obstacles import obstacle_of as obstacle_of
from we_surgery.reading.passes import apply_graphs
from we_surgery.reading.recorded import record_both_modes
from we_surgery.reading.symbolic import trace
from we_surgery.reading.tree import list_layers

_SHOWN_BLOCKS = 3


def read(model: nn.Module, example_inputs: Any = None) -> Reading:
    """Reads ``model`` without changing it.

    With example inputs it records a forward pass. Without them, or if that fails, it traces the
    model symbolically. If that fails too, it lists the module tree.

    Args:
        model: any model in eager mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping.
    """
    with drawing_nothing(model):
        return _read(model, example_inputs)


def read_tree(model: nn.Module) -> list[LayerFacts]:
    """The facts of each layer of ``model``, and of the weights that its GraphModules read."""
    own = [
        ModelGraph(module.graph, dict(module.named_modules()), prefix=name)
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule)
    ]
    return apply_graphs(model, list_layers(model), own)


def _read(model: nn.Module, example_inputs: Any) -> Reading:
    layers = read_tree(model)
    notes: list[str] = []
    if example_inputs is not None:
        recordings, notes = record_both_modes(model, example_inputs)
        if recordings:
            layers = apply_graphs(model, layers, recordings)
            return Reading("recorded", "; ".join(notes), layers)
    with put_back(model):
        graphs, untraceable = trace(model)
        if untraceable:
            shown = "; ".join(untraceable[:_SHOWN_BLOCKS])
            more = len(untraceable) - _SHOWN_BLOCKS
            notes.append(
                f"torch.fx could not trace {shown}" + (f"; {more} more" if more > 0 else "")
            )
        is_whole = bool(graphs) and not (graphs[0].prefix or untraceable)
        layers = apply_graphs(model, layers, graphs, is_whole=is_whole)
    has_graph = bool(graphs) or isinstance(model, fx.GraphModule)
    return Reading("symbolic" if has_graph else "listed", "; ".join(notes), layers)
