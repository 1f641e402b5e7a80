"""A torch.fx graph of a model, traced on a weightless copy."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from we_surgery._util.copies import deep_copy, drawing_nothing
from we_surgery.reading.dataflow import called_name, sources
from we_surgery.reading.hooks import drop_hooks
from we_surgery.reading.kinds import WEIGHTED, is_norm
from we_surgery.reading.recorder import MODULE

# The names of the argument by which a split or chunk is told its pieces.
_PIECES = ("split_size_or_sections", "split_size", "split_sizes", "chunks")


@dataclass(frozen=True)
class TracedBlock:
    """A graph of the model, or of one of its submodules.

    Attributes:
        name: the submodule's name; "" for the whole model.
        graph: its graph; targets are named from the submodule on.
        untraceable: the submodules in it that were kept whole, named likewise.
        constants: tensors that were made while tracing, by their targets.
        is_partial: the forward could not be traced to its end; the graph returns whatever nothing
            before that had used.
    """

    name: str
    graph: fx.Graph
    untraceable: frozenset[str] = frozenset()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    is_partial: bool = False


class LayerTracer(fx.Tracer):
    """A tracer that keeps conv, linear, norm and attention modules whole.

    A submodule that cannot be traced is kept whole as well, and noted in ``untraceable``
    with the reason: one bad block costs one block.

    Args:
        keeps: tells what else is kept whole.
    """

    def __init__(self, keeps: Callable[[nn.Module], bool] = lambda module: False) -> None:
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
) -> tuple[list[TracedBlock], list[str]]:
    """The graphs of ``model``: one, or those of the parts that can be traced.

    The trace runs on a copy whose parameters and buffers are on the meta device: it takes
    no memory of the model's size, and tracing leaves proxies behind in some models. What
    cannot be traced is kept whole, and traced by itself as far as that goes; where its forward
    stops, its children are, too.

    Args:
        model: the model.
        keeps: tells which modules are kept whole beside convs, linear layers, attention and norms.

    Returns:
        The graphs, from the whole model down, and what could not be traced, with the reason
        and the file and line that stopped it.
    """
    blocks: list[TracedBlock] = []
    untraceable: dict[str, str] = {}
    try:
        # Some models draw random numbers while they are traced.
        with drawing_nothing(model):
            pending = [("", weightless_copy(model))]
            while pending:
                name, module = pending.pop(0)
                pending += _trace_block(name, module, blocks, untraceable, keeps)
    except Exception as error:
        return [], [_why(error)]
    return blocks, [f"{name or 'the model as a whole'}: {why}" for name, why in untraceable.items()]


def _trace_block(
    name: str,
    module: nn.Module,
    blocks: list[TracedBlock],
    untraceable: dict[str, str],
    keeps: Callable[[nn.Module], bool],
) -> list[tuple[str, nn.Module]]:
    """Traces one module; returns the submodules that are to be traced by themselves."""
    if isinstance(module, WEIGHTED) or not list(module.children()):
        return []
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return _children(name, module)
    tracer = LayerTracer(keeps)
    left: list[tuple[str, nn.Module]] = []
    is_partial = False
    try:
        graph = tracer.trace(module)
    except Exception as error:
        is_partial = True
        untraceable.setdefault(name, _why(error))
        graph = _until_it_stopped(tracer)
        left += _children(name, module)
    for path, reason in tracer.untraceable.items():
        whole = join(name, path)
        untraceable.setdefault(whole, reason)
        if not is_partial:
            left.append((whole, module.get_submodule(path)))
    if not is_partial or any(node.op == "call_module" for node in graph.nodes):
        constants = _constants(module, graph)
        broken = frozenset(tracer.untraceable)
        blocks.append(TracedBlock(name, graph, broken, constants, is_partial))
    return left


def _until_it_stopped(tracer: fx.Tracer) -> fx.Graph:
    graph = getattr(tracer, "graph", fx.Graph())
    used = {source for node in graph.nodes for source in sources(node)}
    graph.output(tuple(node for node in graph.nodes if node not in used))
    return graph


def _constants(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {n: getattr(module, n) for n in names if n.startswith("_tensor_constant")}


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(join(name, child_name), child) for child_name, child in module.named_children()]


def join(name: str, path: str) -> str:
    """A submodule's qualified name: ``a`` and ``b.c`` give ``a.b.c``; either may be empty."""
    return f"{name}.{path}" if name and path else name or path


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
