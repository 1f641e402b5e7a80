"""Excited weights in torch.fx graphs.

A graph with ``get_attr weight -> F.conv2d`` has no layer whose class could be swapped. There the
excitation is a node of the graph, ``get_attr raw_weight -> call_module excitation -> F.conv2d``.
The weight's owner has the parameters and submodules of an excited layer, so state dicts have the
same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import PythonKeyTracer

from we_surgery.converted.fetches import Fetch, fetches, graph_modules
from we_surgery.converted.layer import ExcitedLayer
from we_surgery.converted.views import own_memory
from we_surgery.errors import InputError, SurgeryError
from we_surgery.excitations import Composition
from we_surgery.excitations.cached import uncached
from we_surgery.excitations.names import excitation_name, raw_name
from we_surgery.reading.obstacles import excited_names


@dataclass(frozen=True)
class ExcitedWeight:
    """One excited weight of a model, of an excited layer or held for a graph.

    Attributes:
        module: the owner's name in the model.
        owner: the module that holds the raw weight and the excitation.
        parameter: the weight's vanilla name in it.
    """

    module: str
    owner: nn.Module
    parameter: str

    @property
    def name(self) -> str:
        """The layer's name in messages."""
        return self.module or self.parameter

    @property
    def raw(self) -> nn.Parameter:
        """The raw weight."""
        return getattr(self.owner, raw_name(self.parameter))  # type: ignore[no-any-return]

    @property
    def excitation(self) -> Composition:
        """What computes the excited weight."""
        return getattr(self.owner, excitation_name(self.parameter))  # type: ignore[no-any-return]

    def excited(self) -> Tensor:
        """The excited weight, computed anew, so that no cached value is verified."""
        with uncached():
            if isinstance(self.owner, ExcitedLayer):
                return getattr(self.owner, self.parameter)  # type: ignore[no-any-return]
            return self.excitation(self.raw)  # type: ignore[no-any-return]

    def folded(self) -> Tensor:
        """The excited weight in memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            return own_memory(self.excited().detach(), self.raw)


def excited_weights(model: nn.Module) -> Iterator[ExcitedWeight]:
    """Each excited weight of ``model`` once, by its owner's first name."""
    for name, module in model.named_modules():
        for parameter in excited_names(module):
            yield ExcitedWeight(name, module, parameter)


def update_graphs(model: nn.Module) -> None:
    """Gives the graphs in ``model`` a node for each excited weight they read, and no others.

    The node comes before the first node that uses the weight. This includes weights of excited
    layers that a graph reads directly. Graphs that are right are not changed.
    """
    for module in graph_modules(model):
        found = fetches(module)
        changes = [_remove_excitations(module, found), _insert_excitations(module, found)]
        if any(changes):
            module.recompile()


def refuse_ill_formed_graphs(model: nn.Module) -> None:
    """Raises if ``graph.lint()`` finds fault with a graph in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            try:
                module.graph.lint()
            except Exception as error:
                raise InputError(
                    f"the graph of {name or 'the model'} is not well-formed: {error}",
                    "Correct the pass that left it so; `graph.lint()` tells when it is right.",
                ) from error


def refuse_changed_graphs(model: nn.Module) -> None:
    """Raises if a graph was rewritten so that its excitations can no longer be taken out."""
    for module in graph_modules(model):
        raw = [f for f in fetches(module) if f.is_excited and f.node.target == f.raw_target]
        sources = {fetch.node: fetch.excitation_target for fetch in raw}
        for fetch in raw:
            for user in fetch.node.users:
                if user.op != "call_module" or user.target != fetch.excitation_target:
                    raise _changed(f"{user.name!r} reads {fetch.raw_target!r} itself")
        targets = set(sources.values())
        for node in module.graph.nodes:
            if node.op == "call_module" and node.target in targets:
                fed = node.all_input_nodes
                if len(fed) != 1 or sources.get(fed[0]) != node.target:
                    raise _changed(f"{node.target!r} is applied to {fed}, not to its raw weight")


def _insert_excitations(module: fx.GraphModule, found: Sequence[Fetch]) -> bool:
    """Puts an excitation before the users of each excited weight that is read by its old name."""
    by_weight: dict[str, list[Fetch]] = {}
    for fetch in found:
        if fetch.is_excited and fetch.node.target == fetch.vanilla_target:
            by_weight.setdefault(fetch.vanilla_target, []).append(fetch)
    order = {node: index for index, node in enumerate(module.graph.nodes)} if by_weight else {}
    for group in by_weight.values():
        first, nodes = group[0], [fetch.node for fetch in group]
        users = list(dict.fromkeys(user for node in nodes for user in node.users))
        for node in nodes:
            node.target = first.raw_target
        if not users:
            continue
        # Not right after the read: an exported graph reads everything at its top, and would keep
        # all excited weights from there on.
        with module.graph.inserting_before(min(users, key=order.__getitem__)):
            excited = module.graph.call_module(first.excitation_target, (first.node,))
        excited.meta = copy(first.node.meta)  # its shape and dtype are those of the weight
        for user in users:
            for node in nodes:
                user.replace_input_with(node, excited)
    if by_weight and issubclass(module.graph._tracer_cls or fx.Tracer, PythonKeyTracer):
        # A pickled graph is traced anew when it is loaded, and the tracer of `make_fx` runs
        # modules where others note their calls: the excited weight would become a constant.
        module._tracer_cls = module.graph._tracer_cls = fx.Tracer
    return bool(by_weight)


def _remove_excitations(module: fx.GraphModule, found: Sequence[Fetch]) -> bool:
    """Lets the users of each weight that is no longer excited read it again.

    If several nodes fetch the weight, each user gets the last one before it.
    """
    released = [f for f in found if not f.is_excited and f.node.target == f.raw_target]
    vanilla = {fetch.node: fetch.vanilla_target for fetch in released}
    excited = {fetch.excitation_target: fetch.vanilla_target for fetch in released}
    latest: dict[str, fx.Node] = {}
    removed: dict[fx.Node, str] = {}
    for node in list(module.graph.nodes) if released else ():
        if node in vanilla:
            node.target = vanilla[node]
            latest[vanilla[node]] = node
        elif node.op == "call_module" and node.target in excited:
            removed[node] = excited[node.target]
        else:
            for source in node.all_input_nodes:
                if source in removed:
                    node.replace_input_with(source, latest[removed[source]])
    for node in removed:
        module.graph.erase_node(node)
    return bool(released)


def _changed(what: str) -> SurgeryError:
    return SurgeryError(
        f"the graph was changed after its conversion: {what}",
        "Strip before passes that rewrite what reads the excited weights.",
    )
