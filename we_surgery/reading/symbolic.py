"""A torch.fx graph of a model, traced on a weightless copy, and what it tells of norms."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from we_surgery.copies import deep_copy, drawing_nothing
from we_surgery.reading.aten_norms import is_norm_operation, passes_scale
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.hooks import drop_hooks
from we_surgery.reading.kinds import WEIGHTED, is_gate, is_norm

# Operations that pass a feature map on: a conv's scale reaches what follows them unchanged.
_TRANSPARENT_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
_TRANSPARENT_NAMES = frozenset(
    "view reshape permute transpose flatten unflatten contiguous movedim swapaxes squeeze "
    "unsqueeze moveaxis clone to float half bfloat16".split()
)
_TRANSPARENT_FUNCTIONS = frozenset(
    [
        torch.reshape,
        torch.permute,
        torch.transpose,
        torch.flatten,
        torch.squeeze,
        torch.unsqueeze,
        torch.movedim,
        F.dropout,
        F.avg_pool2d,
        F.adaptive_avg_pool2d,
    ]
)
_NORM_FUNCTIONS = frozenset([F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm])
_OUTPUT = "the model's output"
_SHAPE_ATTRIBUTES = frozenset(["shape", "size", "dim", "ndim", "device", "dtype", "numel"])


@dataclass(frozen=True)
class TracedBlock:
    """A graph of the model, or of one of its submodules.

    Attributes:
        name: the submodule's name; "" for the whole model.
        graph: its graph; targets are named from the submodule on.
        untraceable: the submodules in it that were kept whole, named likewise.
        constants: tensors that were made while tracing, by their targets.
    """

    name: str
    graph: fx.Graph
    untraceable: frozenset[str] = frozenset()
    constants: Mapping[str, Tensor] = field(default_factory=dict)


class LayerTracer(fx.Tracer):
    """A tracer that keeps conv, linear, norm and attention modules, and gates, whole.

    A submodule that cannot be traced is kept whole as well, and noted in ``untraceable``
    with the reason: one bad block costs one block.
    """

    def __init__(self) -> None:
        super().__init__()
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
        if isinstance(m, WEIGHTED) or is_norm(m) or is_gate(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[list[TracedBlock], list[str]]:
    """The graphs of ``model``: one, or those of the parts that can be traced.

    The trace runs on a copy whose parameters and buffers are on the meta device: it takes
    no memory of the model's size, and tracing leaves proxies behind in some models. What
    cannot be traced is kept whole, and its children are traced by themselves.

    Returns:
        The graphs, from the whole model down, and what could not be traced, with the reason
        and the file and line that stopped it.
    """
    blocks: list[TracedBlock] = []
    untraceable: list[str] = []
    try:
        # Some models draw random numbers while they are traced.
        with drawing_nothing(model):
            pending = [("", weightless_copy(model))]
            while pending:
                name, module = pending.pop(0)
                pending += _trace_block(name, module, blocks, untraceable)
    except Exception as error:
        return [], [_why(error)]
    return blocks, untraceable


def _trace_block(
    name: str, module: nn.Module, blocks: list[TracedBlock], untraceable: list[str]
) -> list[tuple[str, nn.Module]]:
    """Traces one module; returns the submodules that are to be traced by themselves."""
    if isinstance(module, WEIGHTED) or is_gate(module) or not list(module.children()):
        return []
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return _children(name, module)
    tracer = LayerTracer()
    try:
        graph = tracer.trace(module)
        broken = tracer.untraceable
        blocks.append(TracedBlock(name, graph, frozenset(broken), _constants(module, graph)))
    except Exception as error:
        broken = {"": _why(error)}
    left: list[tuple[str, nn.Module]] = []
    for path, reason in broken.items():
        whole = join(name, path)
        untraceable.append(f"{whole or 'the model as a whole'}: {reason}")
        left += _children(whole, module.get_submodule(path))
    return left


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


def mark_norms(model: nn.Module, block: TracedBlock, layers: list[LayerFacts]) -> None:
    """Sets ``followed_by_norm`` for each layer that the block's graph calls.

    What follows the output of a submodule, or what happens in one that was kept whole, is not
    known from this graph: a layer before it keeps what the order of registration says.
    """
    modules = dict(model.get_submodule(block.name).named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in block.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(join(block.name, node.target), []).append(node)
    for layer in layers:
        nodes = calls.get(layer.module)
        if nodes:
            ends = [end for node in nodes for end in _ends(node, modules)]
            unknown = {repr(name) for name in block.untraceable} | (
                {_OUTPUT} if block.name else set()
            )
            if any(evidence in unknown for _, evidence in ends):
                continue
            meets = bool(ends) and all(is_norm_end for is_norm_end, _ in ends)
            layer.followed_by_norm = meets
            layer.norm_evidence = (
                f"{ends[0][1]} follows" if meets else next((e for ok, e in ends if not ok), "")
            )


def norm_after_calls(nodes: Sequence[fx.Node], modules: dict[str, nn.Module]) -> tuple[bool, str]:
    """Whether every path from each of the nodes meets a norm first, and what it meets."""
    ends = [end for node in nodes for end in _ends(node, modules)]
    other = next((evidence for meets, evidence in ends if not meets), None)
    if other is None and ends:
        return True, f"{ends[0][1]} follows"
    return False, other or ""


def _ends(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[bool, str]]:
    """What each path from ``node`` meets first that is not transparent: (is a norm, its name)."""
    ends: list[tuple[bool, str]] = []
    pending, seen = list(node.users), {node}
    while pending:
        user = pending.pop()
        if user in seen or reads_shape_only(user):
            continue
        seen.add(user)
        target = modules.get(user.target) if user.op == "call_module" else None  # type: ignore[arg-type]
        is_function = user.target in _NORM_FUNCTIONS or is_norm_operation(user)
        if (target is not None and is_norm(target)) or is_function:
            ends.append((True, f"{user.target!r}" if user.op == "call_module" else user.name))
        elif _is_transparent(user, target):
            pending.extend(user.users)
        else:
            ends.append((False, _describe(user)))
    return ends


def _is_transparent(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        drops_paths = type(module).__name__ in ("DropPath", "StochasticDepth", "Permute")
        return drops_paths or isinstance(module, _TRANSPARENT_MODULES)
    if node.op == "call_method":
        return node.target in _TRANSPARENT_NAMES
    if node.op != "call_function":
        return False
    return node.target in _TRANSPARENT_FUNCTIONS or passes_scale(node)


def reads_shape_only(node: fx.Node) -> bool:
    """Whether the node asks its argument for its shape, dtype or device."""
    if node.op == "call_method":
        return node.target in _SHAPE_ATTRIBUTES
    is_getattr: Callable[..., Any] = getattr
    return (
        node.op == "call_function"
        and (node.target is is_getattr or node.target is operator.attrgetter)
        and len(node.args) > 1
        and node.args[1] in _SHAPE_ATTRIBUTES
    )


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return _OUTPUT
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node)
    return f"{name!r}" if node.op == "call_module" else f"{name}"


def _why(error: Exception) -> str:
    """The error's first line with the file and line of the model's code that raised it."""
    message = (str(error).strip().splitlines() or [""])[0].partition(". ")[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/we_surgery/" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message}{where}"
