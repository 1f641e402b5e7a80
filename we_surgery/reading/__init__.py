"""A model -> a torch.fx graph -> facts about its layers."""

from __future__ import annotations

from torch import nn

from we_surgery.reading.facts import LayerFacts as LayerFacts
from we_surgery.reading.facts import Reading as Reading
from we_surgery.reading.facts import layer_display_name as layer_display_name
from we_surgery.reading.symbolic import mark_norms, trace
from we_surgery.reading.tree import read_tree as read_tree


def read(model: nn.Module) -> Reading:
    """Reads ``model`` without changing it or running it on data."""
    layers = read_tree(model)
    graph, reason = trace(model)
    if graph is None:
        return Reading("listed", f"torch.fx could not trace the model: {reason}", layers)
    mark_norms(model, graph, layers)
    return Reading("symbolic", "", layers)
