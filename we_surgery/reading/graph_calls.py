"""Weights that the calls of a graph read themselves: ``get_attr -> F.conv2d``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from we_surgery.excitations import WeightLayout
from we_surgery.excitations.names import raw_name
from we_surgery.reading.dataflow import Dataflow, reads_shape_only
from we_surgery.reading.fetches import Fetch, fetches
from we_surgery.reading.gates import gate_operations, gate_reason
from we_surgery.reading.norms import After, after
from we_surgery.reading.symbolic import TracedBlock

_aten = torch.ops.aten
_AS_ATEN: dict[Any, Any] = {
    torch.conv1d: _aten.conv1d,
    torch.conv2d: _aten.conv2d,
    torch.conv3d: _aten.conv3d,
    torch.conv_transpose1d: _aten.conv_transpose1d,
    torch.conv_transpose2d: _aten.conv_transpose2d,
    torch.conv_transpose3d: _aten.conv_transpose3d,
    torch.convolution: _aten.convolution,
    F.linear: _aten.linear,
    torch.mm: _aten.mm,
    torch.addmm: _aten.addmm,
    torch.matmul: _aten.matmul,
    operator.matmul: _aten.matmul,
    torch.t: _aten.t,
    torch.transpose: _aten.transpose,
    torch.permute: _aten.permute,
}


@dataclass(frozen=True)
class _Signature:
    """Where an operation takes what, by position and by keyword."""

    data: tuple[int, str]
    weight: tuple[int, str]
    groups: tuple[int, str] | None = None
    transposed: tuple[int, str] | None = None


_CONV = _Signature((0, "input"), (1, "weight"), (6, "groups"))
_AS_STORED: dict[Any, _Signature] = {
    **dict.fromkeys([_aten.conv1d, _aten.conv2d, _aten.conv3d], _CONV),
    **dict.fromkeys(
        [_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d], _CONV
    ),
    _aten.convolution: _Signature(
        (0, "input"), (1, "weight"), (8, "groups"), transposed=(6, "transposed")
    ),
    _aten.linear: _Signature((0, "input"), (1, "weight")),
}
# These are a linear layer where their second operand is a transposed weight.
_PRODUCTS: dict[Any, _Signature] = {
    _aten.mm: _Signature((0, "self"), (1, "mat2")),
    _aten.matmul: _Signature((0, "self"), (1, "other")),
    _aten.addmm: _Signature((1, "mat1"), (2, "mat2")),
}


@dataclass(frozen=True)
class GraphRead:
    """A trainable parameter that conv or linear calls of a graph take as their weight.

    Attributes:
        owner: the module that holds it.
        parameter: its vanilla name there.
        tensor: the parameter.
        operation: what reads it first, such as ``aten.conv2d``.
        kind: ``conv2d``, ``linear``, ... by that operation.
        layout: its shape and how that operation reads it.
        obstacle: what else reads it, or reads it in another way, or None.
        gate: the attention gate that one of the calls is in, or None.
        followed_by_norm: whether a norm comes after each of the calls.
        norm_evidence: what comes after them.
        constant_input: the calls apply it only to what no input feeds.
    """

    owner: nn.Module
    parameter: str
    tensor: nn.Parameter
    operation: str
    kind: str
    layout: WeightLayout
    obstacle: str | None
    gate: str | None
    followed_by_norm: bool
    norm_evidence: str
    constant_input: bool


@dataclass(frozen=True)
class _Call:
    node: fx.Node
    operation: str
    kind: str
    layout: WeightLayout
    data: Any


def graph_reads(model: nn.Module) -> list[GraphRead]:
    """The weights that the graphs of GraphModules in ``model`` read, in the graphs' order."""
    found: dict[tuple[nn.Module, str], GraphRead] = {}
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            for read in _reads_of(module, module.graph):
                key = (read.owner, read.parameter)
                found[key] = _merged(found[key], read) if key in found else read
    return list(found.values())


def traced_reads(model: nn.Module, blocks: Sequence[TracedBlock]) -> list[GraphRead]:
    """The weights that the calls of a traced model read themselves, in the graphs' order.

    Where torch.fx has not seen all of the model, what it has not seen may read them too: they
    are found, and left alone.
    """
    first = next(iter(blocks), None)
    is_whole = first is not None and not (first.name or first.untraceable or first.is_partial)
    found: dict[tuple[nn.Module, str], GraphRead] = {}
    for block in blocks:
        for read in _reads_of(model.get_submodule(block.name), block.graph):
            key = (read.owner, read.parameter)
            found[key] = _merged(found[key], read) if key in found else read
    if is_whole:
        return list(found.values())
    unseen = (
        "is read by its module's forward, of which torch.fx has not seen all; give example inputs"
    )
    return [replace(read, obstacle=read.obstacle or unseen) for read in found.values()]


def _reads_of(module: nn.Module, graph: fx.Graph) -> Iterator[GraphRead]:
    by_parameter: dict[tuple[nn.Module, str], list[Fetch]] = {}
    for fetch in fetches(module, graph):
        by_parameter.setdefault((fetch.owner, fetch.parameter), []).append(fetch)
    modules = dict(module.named_modules())
    flow = Dataflow(graph, modules)
    gates = gate_operations(flow) if by_parameter else {}
    whole = {
        modules.get(str(node.target)): node for node in graph.nodes if _runs_unseen(node, modules)
    }
    for (owner, name), group in by_parameter.items():
        tensor = getattr(owner, raw_name(name) if group[0].is_excited else name)
        if tensor is None or isinstance(tensor, UninitializedParameter) or tensor.ndim < 2:
            continue
        nodes = [fetch.node for fetch in group]
        excited = [
            user
            for fetch in group
            for user in fetch.node.users
            if fetch.is_excited and user.target == fetch.excitation_target
        ]
        uses = [use for node in (excited or nodes) for use in _uses(node, tensor)]
        if owner in whole:
            uses.append(whole[owner])
        calls = [use for use in uses if isinstance(use, _Call)]
        if not calls:
            continue
        obstacle = "is excited already" if excited else _obstacle(calls, uses)
        comes = After.all_of(after(call.node, flow) for call in calls)
        gate = next((gates[call.node] for call in calls if call.node in gates), None)
        yield GraphRead(
            owner=owner,
            parameter=name,
            tensor=tensor,
            operation=calls[0].operation,
            kind=calls[0].kind,
            layout=calls[0].layout,
            obstacle=obstacle,
            gate=gate_reason(gate) if gate is not None else None,
            followed_by_norm=bool(comes.is_norm),
            norm_evidence=comes.reason,
            constant_input=all(call.data not in flow.fed for call in calls),
        )


def _runs_unseen(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node calls a module whose forward, which may read its weights, is in no graph."""
    return node.op == "call_module" and not isinstance(
        modules.get(str(node.target)), fx.GraphModule
    )


def _obstacle(calls: list[_Call], uses: list[_Call | fx.Node]) -> str | None:
    stranger = next((use for use in uses if isinstance(use, fx.Node)), None)
    if stranger is not None:
        return f"is also read by {stranger.name!r}, which is no conv or linear call"
    first = calls[0]
    other = next(
        (call for call in calls if (call.kind, call.layout) != (first.kind, first.layout)), None
    )
    if other is not None:
        return f"is read by {first.node.name!r} and, in another way, by {other.node.name!r}"
    if first.kind == "linear" and len(first.layout.shape) != 2:
        return f"is a stack of matrices of shape {first.layout.shape}"
    return None


def _merged(first: GraphRead, second: GraphRead) -> GraphRead:
    """One weight that two graphs read."""
    obstacle = first.obstacle or second.obstacle
    if obstacle is None and (first.kind, first.layout) != (second.kind, second.layout):
        obstacle = "is read by two graphs in different ways"
    return replace(
        first,
        obstacle=obstacle,
        gate=first.gate or second.gate,
        followed_by_norm=first.followed_by_norm and second.followed_by_norm,
        norm_evidence=(second if first.followed_by_norm else first).norm_evidence,
        constant_input=first.constant_input and second.constant_input,
    )


def _uses(weight: fx.Node, tensor: nn.Parameter) -> Iterator[_Call | fx.Node]:
    """The calls that take ``weight`` as their weight, and the nodes that take it otherwise."""
    for user in weight.users:
        if reads_shape_only(user):
            continue
        if tensor.ndim == 2 and _transposes(user):
            yield from (
                _call(_PRODUCTS, product, user, tensor) or product for product in user.users
            )
        else:
            yield _call(_AS_STORED, user, weight, tensor) or user


def _call(
    signatures: dict[Any, _Signature], node: fx.Node, weight: fx.Node, tensor: nn.Parameter
) -> _Call | None:
    operation = _operation(node)
    signature = signatures.get(operation)
    operands = [*node.args, *node.kwargs.values()]
    if signature is None or _argument(node, signature.weight) is not weight:
        return None
    if sum(operand is weight for operand in operands) > 1:
        return None
    groups = _argument(node, signature.groups, 1)
    transposed = "transpose" in str(operation) or _argument(node, signature.transposed, False)
    if not isinstance(groups, int) or not isinstance(transposed, bool):
        return None
    kind = "linear"
    if signatures is _AS_STORED and operation is not _aten.linear:
        kind = f"conv{'_transpose' if transposed else ''}{tensor.ndim - 2}d"
    return _Call(
        node=node,
        operation=str(operation),
        kind=kind,
        layout=WeightLayout(tuple(tensor.shape), groups, transposed),
        data=_argument(node, signature.data),
    )


def _operation(node: fx.Node) -> Any:
    """The aten operation, whatever its overload or its Python name; None for anything else."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    try:
        return getattr(target, "overloadpacket", None) or _AS_ATEN.get(target, target)
    except TypeError:  # a callable that cannot be hashed
        return None


def _argument(node: fx.Node, place: tuple[int, str] | None, default: Any = None) -> Any:
    if place is None:
        return default
    index, name = place
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def _transposes(node: fx.Node) -> bool:
    """Whether the node is its argument, a matrix, transposed."""
    rest = node.args[1:]
    is_getattr: Callable[..., Any] = getattr
    if node.op == "call_function" and node.target is is_getattr:
        return rest in (("T",), ("mT",))
    name = node.target if node.op == "call_method" else str(_operation(node)).removeprefix("aten.")
    if name in ("t", "numpy_T"):
        return not node.kwargs
    if name not in ("transpose", "permute") or node.kwargs:
        return False
    dimensions: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not all(isinstance(dimension, int) for dimension in dimensions):
        return False
    places = [dimension % 2 for dimension in dimensions]
    return places == [1, 0] or (name == "transpose" and places == [0, 1])
