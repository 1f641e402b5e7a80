"""Which parameters the graphs of GraphModules read, and which of them are excited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from we_surgery.excitations.names import RAW_PREFIX, excitation_name, raw_name
from we_surgery.reading.obstacles import excited_names


@dataclass(frozen=True)
class Fetch:
    """A ``get_attr`` node that reads a parameter, excited or not, by its vanilla name."""

    node: fx.Node
    owner: nn.Module
    parameter: str

    @property
    def is_excited(self) -> bool:
        """Whether the owner has an excitation for the parameter."""
        return self.parameter in excited_names(self.owner)

    @property
    def vanilla_target(self) -> str:
        """What the node reads in a vanilla graph."""
        return self._beside(self.parameter)

    @property
    def raw_target(self) -> str:
        """What it reads before an excitation node."""
        return self._beside(raw_name(self.parameter))

    @property
    def excitation_target(self) -> str:
        """What that excitation node calls."""
        return self._beside(excitation_name(self.parameter))

    def _beside(self, name: str) -> str:
        path, dot, _ = str(self.node.target).rpartition(".")
        return f"{path}{dot}{name}"


def fetches(module: nn.Module, graph: fx.Graph | None = None) -> list[Fetch]:
    """The nodes that read parameters, in their order."""
    found = []
    own: Any = module.graph if graph is None else graph
    for node in own.nodes:
        if node.op != "get_attr":
            continue
        path, _, name = str(node.target).rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:  # an attribute of something that is no module
            continue
        vanilla, excited = name.removeprefix(RAW_PREFIX), excited_names(owner)
        if name in excited or (name in owner._parameters and vanilla not in excited):
            found.append(Fetch(node, owner, name))
        elif vanilla in owner._parameters or vanilla in excited:
            found.append(Fetch(node, owner, vanilla))
    return found


def held_by_graphs(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """Tells whether a parameter of an owner is read by a graph and by no forward.

    Such parameters belong to a GraphModule itself, or to modules without a class of their own.
    """
    fetched = [fetch for module in graph_modules(model) for fetch in fetches(module)]
    read = {(fetch.owner, fetch.parameter) for fetch in fetched}

    def is_held(owner: nn.Module, parameter: str) -> bool:
        if isinstance(owner, fx.GraphModule):
            return True
        return type(owner) is nn.Module and (owner, parameter) in read

    return is_held


def graph_modules(model: nn.Module) -> Iterator[fx.GraphModule]:
    """The GraphModules in ``model``."""
    return (module for module in model.modules() if isinstance(module, fx.GraphModule))
