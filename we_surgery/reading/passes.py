"""All passes over a reading's graphs: facts for each layer, and further layers."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from we_surgery._util.scripted import own_parameters
from we_surgery.errors import SurgeryError
from we_surgery.excitations import WeightLayout
from we_surgery.excitations.names import RAW_PREFIX, excitation_name
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.gates import gate_operations, gate_reason
from we_surgery.reading.graph import ModelGraph
from we_surgery.reading.kinds import kind_of
from we_surgery.reading.norms import After, after
from we_surgery.reading.obstacles import converted_obstacle_of, excited_names, obstacle_of
from we_surgery.reading.recorded import first_line
from we_surgery.reading.shifts import shift_before
from we_surgery.reading.traced_shifts import traced_shift_before
from we_surgery.reading.tree import ancestors, mark_ties
from we_surgery.reading.weights import WeightRead, other_readers, weight_reads, written_weights

logger = logging.getLogger(__name__)

_UNSEEN = "is read by a forward pass that torch.fx could not fully trace; give example inputs"


def apply_graphs(
    model: nn.Module,
    layers: Sequence[LayerFacts],
    graphs: Sequence[ModelGraph],
    *,
    is_whole: bool = True,
) -> list[LayerFacts]:
    """The layers with the facts of one reading's graphs, and the weights that no layer class owns.

    ``is_whole`` says that the graphs show all of the model.
    """
    found = _Findings(model, graphs, is_whole)
    modules = dict(model.named_modules())
    known = {layer.path for layer in layers}
    for layer in layers:
        parameter = own_parameters(modules[layer.module]).get(layer.parameter)
        name = found.first_names.get(id(parameter), layer.path)
        if found.is_recorded:  # it knows no other name of the parameter
            known.add(name)
        found.mark(layer, name, is_read=parameter is not None)
    bare = found.bare_weights(modules, known)
    order = {name: index for index, name in enumerate(modules)}
    everything = sorted([*layers, *bare], key=lambda facts: order[facts.module])
    mark_ties(model, everything)
    return everything


class _Findings:
    """What each pass found in the graphs of one reading; parameters go by their first names."""

    def __init__(self, model: nn.Module, graphs: Sequence[ModelGraph], is_whole: bool) -> None:
        self.is_whole = is_whole
        self.is_recorded = any(graph.is_recorded for graph in graphs)
        self.first_names = {id(p): name for name, p in model.named_parameters()}
        self._by_any_name = {
            name: self.first_names[id(p)]
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        self.reads: dict[str, list[WeightRead]] = defaultdict(list)
        self.written: dict[str, str] = {}
        self.other_readers: dict[str, str] = {}
        self.gates: dict[fx.Node, str] = {}
        self.calls: dict[str, list[fx.Node]] = defaultdict(list)
        for graph in graphs:
            self._go_over(graph)

    def _go_over(self, graph: ModelGraph) -> None:
        reads = list(weight_reads(graph))
        read_by: dict[fx.Node, set[str]] = defaultdict(set)
        for read in reads:
            self.reads[self._first(read.parameter)].append(read)
            read_by[read.node].add(read.parameter)
        for name, writer in written_weights(graph).items():
            self.written.setdefault(self._first(name), writer)
        for name, reader in other_readers(graph, read_by).items():
            self.other_readers.setdefault(self._first(name), reader)
        self.gates |= gate_operations(graph)
        for node in graph.graph.nodes:
            if node.op == "call_module":
                self.calls[graph.full_name(str(node.target))].append(node)

    def _first(self, name: str) -> str:
        return self._by_any_name.get(name, name)

    def mark(self, layer: LayerFacts, name: str, *, is_read: bool = True) -> None:
        """Sets the facts of a layer whose parameter is ``name``.

        Facts that the graphs do not show stay as class names and the order of registration say,
        as do all facts about a parameter that no operation reads directly.
        """
        reads = self.reads.get(name, []) if is_read else []
        self._mark_written(layer, self.written.get(name))
        self._mark_gate(layer, reads)
        if self.is_recorded and is_read:
            layer.reads = max(Counter(id(read.graph) for read in reads).values(), default=0)
        if not reads:
            return
        readers = dict.fromkeys(read.reader for read in reads if read.reader != layer.module)
        layer.readers = tuple(readers)
        trained = [read.no_gradient for read in reads if read.graph.training]
        layer.no_gradient = bool(trained) and all(trained)
        layer.constant_input = self.is_whole and all(read.constant_input for read in reads)
        norm = After.all_of(after(read.node, read.graph) for read in reads)
        if norm.is_norm is not None:
            layer.followed_by_norm, layer.norm_evidence = norm.is_norm, norm.reason
        _mark_shift(layer, reads, self.is_recorded)

    def _mark_written(self, layer: LayerFacts, writer: str | None) -> None:
        """An excited weight is a result, and what is written into it is lost."""
        if writer is None or layer.obstacle is not None:
            return
        by = "the model" if not writer else "its layer" if writer == layer.module else repr(writer)
        layer.obstacle = f"is written to in the forward pass, by {by}"

    def _mark_gate(self, layer: LayerFacts, reads: Sequence[WeightRead]) -> None:
        """What was kept whole inside a gate is in it with all of its layers."""
        if layer.gate is not None:
            return
        nodes = [read.node for read in reads]
        for name in (layer.module, *ancestors(layer.module)):
            nodes += self.calls.get(name, ())
        gate = next((self.gates[node] for node in nodes if node in self.gates), None)
        layer.gate = None if gate is None else gate_reason(gate)

    def bare_weights(self, modules: Mapping[str, nn.Module], known: set[str]) -> list[LayerFacts]:
        """Parameters that are read as weights and that no layer class owns."""
        found: list[LayerFacts] = []
        excitations: dict[tuple[str, str], LayerFacts] = {}
        names = {read.parameter: first for first, reads in self.reads.items() for read in reads}
        for name, first in names.items():
            if name in known or name not in self._by_any_name:
                continue
            facts = _bare_weight(name, self.reads[first], modules, self.other_readers.get(first))
            if facts is None or facts.path in known:
                continue
            place = facts.module, excitation_name(facts.parameter)
            if facts.obstacle is None and place in excitations:
                other = excitations[place].path
                facts.obstacle = f"would have an excitation of the same name as {other!r}"
            if facts.obstacle is None and not self.is_whole:
                facts.obstacle = _UNSEEN
            excitations.setdefault(place, facts)
            self.mark(facts, first)
            found.append(facts)
        return found


def _mark_shift(layer: LayerFacts, reads: Sequence[WeightRead], is_recorded: bool) -> None:
    """Marks convs that are shift-fed in any of their calls: LWE would harm that call.

    A recording overrides what class names suggest.
    """
    if layer.kind == "attention":
        return
    channel_dim = 1 if layer.kind.startswith("conv") else -1
    shifts = []
    for read in reads:
        if read.data is None:
            continue
        try:
            if is_recorded:
                shift = shift_before(read.data, channel_dim, read.graph)
            else:
                shift = traced_shift_before(read.data, layer.kind, layer.layout, read.graph)
        except SurgeryError:
            raise
        except Exception as error:
            logger.info("%s: its input cannot be traced back: %s", layer.name, first_line(error))
        else:
            shifts += [] if shift is None else [shift]
    if shifts:
        calls = f" in {len(shifts)} of {len(reads)} reads" if len(shifts) < len(reads) else ""
        layer.shift = f"{shifts[0]}{calls}"
    elif is_recorded:
        layer.shift = None


def _bare_weight(
    name: str, reads: Sequence[WeightRead], modules: Mapping[str, nn.Module], other: str | None
) -> LayerFacts | None:
    """Facts of a parameter that is a conv's or linear's weight without a module of that kind."""
    owner_name, _, own_name = name.rpartition(".")
    owner = modules.get(owner_name)
    if owner is None or kind_of(owner) is not None:
        return None
    if isinstance(owner, parametrize.ParametrizationList):
        return None  # the layer that has the parametrized weight has a row
    parameter = own_parameters(owner).get(own_name)
    if parameter is None or isinstance(parameter, UninitializedParameter) or parameter.ndim < 2:
        return None
    vanilla = own_name.removeprefix(RAW_PREFIX)
    if vanilla not in excited_names(owner):
        vanilla = own_name
    first = reads[0]
    is_turned = not first.is_conv and not any(read.filters_first for read in reads)
    kind = "linear"
    if first.is_conv:
        kind = f"conv{'_transpose' if first.transposed else ''}{parameter.ndim - 2}d"
    elif is_turned and parameter.ndim == 2:
        kind = "linear_transpose"
    converted_obstacle = converted_obstacle_of(owner, vanilla)
    if kind == "linear_transpose":
        converted_obstacle = "is multiplied as x @ W, whose filters are not its first axis"
    return LayerFacts(
        module=owner_name,
        parameter=vanilla,
        kind=kind,
        type_name=_type_name(owner, first),
        layout=WeightLayout(
            tuple(parameter.shape), first.groups, first.transposed or kind == "linear_transpose"
        ),
        frozen=not parameter.requires_grad,
        obstacle=obstacle_of(owner, vanilla)
        or _obstacle_of_bare(owner, parameter, reads, kind, other),
        converted_obstacle=converted_obstacle,
    )


def _obstacle_of_bare(
    owner: nn.Module,
    parameter: nn.Parameter,
    reads: Sequence[WeightRead],
    kind: str,
    other: str | None,
) -> str | None:
    first = reads[0]
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        # One may write to its weight, or give it sparse gradients.
        return "is also the table of an embedding"
    if any(read.computed for read in reads):
        return "is one part of a weight that its module computes"
    if other is not None:
        return f"is also read by {other}, which is not a conv or linear call"
    for read in reads:
        if (read.is_conv, read.transposed, read.groups) != (
            first.is_conv,
            first.transposed,
            first.groups,
        ):
            ways = " and ".join(repr(one.node.name) for one in (first, read))
            return f"is read in different ways by {ways}"
    if kind == "linear_transpose":
        return None
    if not all(read.filters_first for read in reads):
        return "is multiplied as x @ W, whose filters are not its first axis"
    if kind == "linear" and parameter.ndim != 2:
        return f"is a stack of matrices of shape {tuple(parameter.shape)}"
    return None


def _type_name(owner: nn.Module, read: WeightRead) -> str:
    """The owner's class; the operation where only a graph has the parameter."""
    if type(owner) is nn.Module or isinstance(owner, fx.GraphModule):
        return read.graph.describe(read.node)
    return f"{type(owner).__module__}.{type(owner).__qualname__}"
