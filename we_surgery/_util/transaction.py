"""In-place changes to a model that are made completely or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import fx, nn

from we_surgery._util.scripted import is_scripted


class AllOrNothing:
    """A block that restores the given modules if it fails at any point.

    It restores their classes and attributes, their tables of parameters, buffers, submodules and
    hooks, the memory and gradients of their parameters, and their torch.fx graphs, but not values
    that are overwritten in place. All of it is recorded before the block runs.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        own = [module for module in modules if not is_scripted(module)]
        self._modules = [_ModuleState.of(module) for module in own]
        parameters = (p for module in own for p in module._parameters.values())
        self._parameters = [(p, p.data, p.grad) for p in parameters if p is not None]
        graphs = [module for module in own if isinstance(module, fx.GraphModule)]
        self._graphs = [_GraphState.of(module) for module in graphs]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        for module in self._modules:
            module.put_back()
        for parameter, data, gradient in self._parameters:
            parameter.data, parameter.grad = data, gradient
        for graph in self._graphs:
            graph.put_back()


@dataclass(frozen=True)
class _ModuleState:
    """A module's class, its attributes, and what is in those of them that are tables."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    tables: list[tuple[Any, Any]]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        attributes = dict(vars(module))
        tables = [
            (table, copy.copy(table))
            for name in _TABLES
            if isinstance(table := attributes.get(name), dict | set)
        ]
        return _ModuleState(module, type(module), attributes, tables)

    def put_back(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        for table, before in ((vars(self.module), self.attributes), *self.tables):
            if not _has_the_same(table, before):
                table.clear()
                table.update(before)


_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


def _has_the_same(table: Any, before: Any) -> bool:
    if isinstance(table, set):
        return bool(table == before)
    return list(table) == list(before) and all(table[name] is before[name] for name in before)


@dataclass(frozen=True)
class _GraphState:
    """The graph of a GraphModule, and a copy for where it was changed."""

    module: fx.GraphModule
    graph: fx.Graph
    nodes: list[tuple[Any, ...]]
    copied: fx.Graph

    @staticmethod
    def of(module: fx.GraphModule) -> _GraphState:
        graph = copied = module.graph
        # Of one that is not well-formed, which surgery refuses, there is no copy.
        with suppress(Exception):
            copied = copy.deepcopy(graph)
        return _GraphState(module, graph, _nodes(graph), copied)

    def put_back(self) -> None:
        if _nodes(self.graph) != self.nodes:
            self.module.graph = self.copied


def _nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]
