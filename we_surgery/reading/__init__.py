"""A model -> a torch.fx graph -> facts about its layers."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from we_surgery._util.copies import drawing_nothing
from we_surgery.reading.facts import Form as Form
from we_surgery.reading.facts import LayerFacts as LayerFacts
from we_surgery.reading.facts import Reading as Reading
from we_surgery.reading.facts import layer_display_name as layer_display_name
from we_surgery.reading.graph_calls import traced_reads
from we_surgery.reading.namespaces import put_back
from we_surgery.reading.recorded_facts import apply_recordings, record_both_modes
from we_surgery.reading.symbolic import trace
from we_surgery.reading.symbolic_shifts import mark_shifts
from we_surgery.reading.traced_facts import mark_gates_and_norms
from we_surgery.reading.tree import converted_obstacle_of as converted_obstacle_of
from we_surgery.reading.tree import obstacle_of as obstacle_of
from we_surgery.reading.tree import read_tree as read_tree

_SHOWN_BLOCKS = 3


def read(model: nn.Module, example_inputs: Any = None) -> Reading:
    """Reads ``model`` without changing it.

    With example inputs one forward is recorded; without them, or where that fails, the model
    is traced symbolically; where that fails too, its module tree is listed.

    Args:
        model: any model in eager mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping.
    """
    with drawing_nothing(model):
        return _read(model, example_inputs)


def _read(model: nn.Module, example_inputs: Any) -> Reading:
    layers = read_tree(model)
    notes: list[str] = []
    if example_inputs is not None:
        recordings, notes = record_both_modes(model, example_inputs)
        if recordings:
            return Reading(
                "recorded", "; ".join(notes), apply_recordings(model, layers, recordings)
            )
    with put_back(model):
        return _read_by_trace(model, layers, notes)


def _read_by_trace(model: nn.Module, layers: list[LayerFacts], notes: list[str]) -> Reading:
    blocks, untraceable = trace(model)
    if untraceable:
        shown = "; ".join(untraceable[:_SHOWN_BLOCKS])
        more = len(untraceable) - _SHOWN_BLOCKS
        notes.append(f"torch.fx could not trace {shown}" + (f"; {more} more" if more > 0 else ""))
    traced = traced_reads(model, blocks)
    if traced:
        layers = read_tree(model, traced)
    for block in blocks:
        mark_gates_and_norms(model, block, layers)
        mark_shifts(model, block, layers)
    has_graph = bool(blocks) or isinstance(model, fx.GraphModule)
    return Reading("symbolic" if has_graph else "listed", "; ".join(notes), layers)
