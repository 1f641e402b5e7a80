"""The symbolic reading: torch.fx traces a weightless copy of the model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from we_surgery._util.copies import deep_copy, drawing_nothing
from we_surgery.reading.graph import MODULE, ModelGraph, called_name, join, sources
from we_surgery.reading.kinds import WEIGHTED, is_norm
from we_surgery.reading.running import drop_hooks

# The argument with the pieces of a split or chunk.
_PIECES = ("split_size_or_sections", "split_size", "split_sizes", "chunks")


class LayerTracer(fx.Tracer):
    """A tracer that keeps conv, linear, norm and attention modules whole.

    A submodule that cannot be traced is kept whole too, with the reason in ``untraceable``: one bad
    block costs one block.
    """

    def __init__(self, keeps: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.keeps = keeps
        self.untraceable: dict[str, str] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        last, stack = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.module_stack = stack
            name = self.path_of_module(m)
            self.untraceable[name] = _why(error)
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            return self.create_proxy("call_module", name, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, WEIGHTED) or is_norm(m) or self.keeps(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def iter(self, obj: Any) -> Iterator[Any]:
        count = _pieces(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[MODULE] = self.scope.module_path
        return node

    def trace_as_far_as_it_goes(self, module: nn.Module) -> tuple[fx.Graph, str]:
        """The graph, and why it ends early, or "".

        A graph that ends early returns all values that no node uses.
        """
        try:
            with _patches_taken_back():
                return self.trace(module), ""
        except Exception as error:
            graph = getattr(self, "graph", fx.Graph())
            used = {source for node in graph.nodes for source in sources(node)}
            graph.output(tuple(node for node in graph.nodes if node not in used))
            return graph, _why(error)


@contextmanager
def _patches_taken_back() -> Iterator[None]:
    """What fx patches while it traces is as before, also after a Ctrl-C in its own clean-up."""
    before = _symbolic_trace.CURRENT_PATCHER
    try:
        yield
    finally:
        left = _symbolic_trace.CURRENT_PATCHER
        if left is not None and left is not before:
            for patch in left.patches_made:
                with suppress(KeyError):  # a name that is deleted already
                    patch.revert()
            _symbolic_trace.CURRENT_PATCHER = before


def _pieces(node: fx.Node) -> int | None:
    """How many pieces a split or chunk gives, where its call says so."""
    if called_name(node) not in ("split", "splitwithsizes", "chunk"):
        return None
    named = [node.kwargs[name] for name in _PIECES if name in node.kwargs]
    (wanted,) = (*node.args[1:2], *named)[:1] or (None,)
    if isinstance(wanted, list | tuple):
        return len(wanted)
    return wanted if called_name(node) == "chunk" and isinstance(wanted, int) else None


def trace(
    model: nn.Module, keeps: Callable[[nn.Module], bool] = lambda module: False
) -> tuple[list[ModelGraph], list[str]]:
    """The graphs of ``model``: one, or those of the parts that can be traced.

    It traces a copy on the meta device: this needs no memory for weights, and tracing leaves
    proxies in some models. A submodule that cannot be traced is kept whole, and traced separately
    as far as possible, then its children. ``keeps`` selects further modules to keep whole. Returns
    the graphs, from the whole model down, and what could not be traced, with reason, file and line.
    """
    graphs: list[ModelGraph] = []
    untraceable: dict[str, str] = {}
    try:
        # Some models draw random numbers during tracing.
        with drawing_nothing(model):
            pending = [("", weightless_copy(model))]
            while pending:
                name, module = pending.pop(0)
                pending += _trace_block(
                    name, module, LayerTracer(keeps), model, graphs, untraceable
                )
    except Exception as error:
        return [], [_why(error)]
    return graphs, [f"{name or 'the model as a whole'}: {why}" for name, why in untraceable.items()]


def _trace_block(
    name: str,
    module: nn.Module,
    tracer: LayerTracer,
    model: nn.Module,
    graphs: list[ModelGraph],
    untraceable: dict[str, str],
) -> list[tuple[str, nn.Module]]:
    """Traces one module of the copy; returns the submodules that are to be traced by themselves."""
    children = [(join(name, child_name), child) for child_name, child in module.named_children()]
    is_leaf = not children and (name or tracer.is_leaf_module(module, name))
    if is_leaf or isinstance(module, WEIGHTED):
        return []
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return children
    graph, stopped = tracer.trace_as_far_as_it_goes(module)
    if stopped:
        untraceable.setdefault(name, stopped)
    for path, reason in tracer.untraceable.items():
        untraceable.setdefault(join(name, path), reason)
    if not stopped or any(node.op == "call_module" for node in graph.nodes):
        found = ModelGraph(
            graph,
            modules=dict(model.get_submodule(name).named_modules()),
            prefix=name,
            constants=_constants(module, graph),
            unseen=frozenset(tracer.untraceable),
            is_partial=bool(stopped),
        )
        graphs.append(found)
    if stopped:
        return children
    return [(join(name, path), module.get_submodule(path)) for path in tracer.untraceable]


def _constants(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {n: getattr(module, n) for n in names if n.startswith("_tensor_constant")}


def weightless_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` on the meta device, without hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = meta
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    weightless = deep_copy(model, memo)
    drop_hooks(weightless)
    return weightless


def _why(error: Exception) -> str:
    """The error's first line with the file and line of the model's code that raised it."""
    message = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/we_surgery/" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message}{where}"
