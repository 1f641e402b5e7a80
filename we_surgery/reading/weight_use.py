"""Who reads each weight, and how: a pass over a recorded graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx
from torch.utils._pytree import tree_iter

from we_surgery.reading.dataflow import fed_by_input, is_view, operation_name
from we_surgery.reading.recorded import Recording
from we_surgery.reading.recorder import (
    EXCITATION,
    MODULE,
    NO_GRADIENT,
    SHAPE,
    after_replacement,
)

# Where a matrix or conv operation takes its data and its weight: pairs of argument positions.
# For a plain matrix product either operand may be the weight.
_OPERANDS: dict[str, tuple[tuple[int, int], ...]] = {
    "aten.convolution": ((0, 1),),
    "aten.linear": ((0, 1),),
    "aten.mm": ((0, 1), (1, 0)),
    "aten.bmm": ((0, 1), (1, 0)),
    "aten.matmul": ((0, 1), (1, 0)),
    "aten.mv": ((1, 0),),
    "aten.addmm": ((1, 2), (2, 1)),
    "aten.baddbmm": ((1, 2), (2, 1)),
    "aten._native_multi_head_attention": ((0, 5), (0, 7)),
    "aten._transformer_encoder_layer_fwd": ((0, 3), (0, 5), (0, 14), (0, 16)),
}
# Operations that present a tensor in another form, in memory of its own or not.
_COPIES = frozenset(["aten.clone", "aten._to_copy", "aten.contiguous", "aten.lift_fresh"])
_TRANSPOSES = frozenset(["aten.t", "aten.transpose", "aten.permute", "aten.numpy_T"])
# The operations that take their weight as the layer stores it, not transposed.
_AS_STORED = frozenset(
    [
        "aten.convolution",
        "aten.linear",
        "aten._native_multi_head_attention",
        "aten._transformer_encoder_layer_fwd",
    ]
)


@dataclass(frozen=True)
class WeightRead:
    """One read of a parameter as the weight of a conv, linear or attention operation.

    Attributes:
        parameter: the parameter's qualified name.
        operation: the aten operation, such as ``aten.convolution``.
        reader: the innermost module that was running.
        filters_first: the operation takes the parameter's first axis as its filters, as
            ``F.linear(x, W)`` and ``W @ x`` do and ``x @ W`` does not.
        computed: the parameter passes through arithmetic first, as in ``StdConv2d``.
        constant_input: what the weight is applied to does not depend on the model's input.
        in_excitation: the operation belongs to an excitation.
        no_gradient: the model had turned gradients off, in train mode.
        transposed: the operation is a transposed conv.
        groups: the conv's groups; 1 for all else.
        node: the operation's node in the recorded graph.
        data: the node of what the weight is applied to.
    """

    parameter: str
    operation: str
    reader: str
    filters_first: bool
    computed: bool
    constant_input: bool
    in_excitation: bool
    no_gradient: bool
    transposed: bool = False
    groups: int = 1
    node: fx.Node = field(kw_only=True, repr=False, compare=False)
    data: fx.Node | None = field(default=None, kw_only=True, repr=False, compare=False)


@dataclass(frozen=True)
class _Origin:
    """A parameter that a tensor is made from alone."""

    parameter: str
    transposes: int
    computed: bool


def weight_reads(
    recording: Recording, fed: set[fx.Node] | None = None
) -> dict[str, list[WeightRead]]:
    """Each parameter's reads as a weight, by its qualified name, in the order of execution.

    Args:
        recording: a recorded forward.
        fed: the nodes that depend on the model's input, where they are known already.
    """
    fed = fed_by_input(recording.graph) if fed is None else fed
    reads: dict[str, list[WeightRead]] = defaultdict(list)
    for node in recording.graph.nodes:
        name = operation_name(node)
        for data_index, weight_index in _OPERANDS.get(name, ()):
            data, weight = _argument(node, data_index), _argument(node, weight_index)
            if weight is None or weight in fed:
                continue
            # In W @ x the filters are W's rows, in x @ W its columns.
            is_left = weight_index < data_index
            for origin in _origins(weight):
                is_turned = origin.transposes % 2 == 1
                stored = name in _AS_STORED or is_turned is not is_left
                constant = data is not None and data not in fed
                # Of two operands without input, only one that comes in the way of F.linear is told
                # apart as the weight.
                if constant and (is_left or not stored):
                    continue
                conv = name == "aten.convolution"
                reads[origin.parameter].append(
                    WeightRead(
                        parameter=origin.parameter,
                        operation=name,
                        reader=node.meta[MODULE],
                        filters_first=stored,
                        computed=origin.computed,
                        constant_input=constant,
                        in_excitation=node.meta[EXCITATION],
                        no_gradient=node.meta[NO_GRADIENT],
                        transposed=conv and bool(node.args[6]),
                        groups=int(node.args[8]) if conv else 1,
                        node=node,
                        data=data,
                    )
                )
    return dict(reads)


def written_weights(recording: Recording) -> dict[str, str]:
    """What the forward writes to: parameters, or excitations into whose results it writes.

    Args:
        recording: a recorded forward.

    Returns:
        For each qualified name, the name of the module that writes.
    """
    written: dict[str, str] = {}
    for node in recording.graph.nodes:
        for target in _written_by(node):
            origin = target
            while is_view(origin) and operation_name(origin) not in _COPIES:
                origin = origin.all_input_nodes[0]
            if origin.op == "get_attr":
                written.setdefault(str(origin.target), node.meta[MODULE])
            elif origin.meta.get(EXCITATION):
                written.setdefault(origin.meta[MODULE], node.meta[MODULE])
    return written


def _written_by(node: fx.Node) -> list[fx.Node]:
    if node.target is after_replacement:
        return node.all_input_nodes[:1]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    arguments = [
        node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [found for found in tree_iter(arguments) if isinstance(found, fx.Node)]


def _argument(node: fx.Node, index: int) -> fx.Node | None:
    value = node.args[index] if index < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


def _is_turned(node: fx.Node, source: fx.Node) -> bool:
    """Whether a view exchanges the axes of the matrix in it, those longer than 1.

    An einsum moves such axes around among others of length 1. A tensor that has more or less
    than two of them counts as turned by any permutation.
    """
    name = operation_name(node)
    if name not in _TRANSPOSES:
        return False
    rank = len(source.meta[SHAPE])
    order = list(range(rank))
    if name == "aten.permute":
        order = [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif name == "aten.transpose":
        first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = second, first
    else:
        order.reverse()
    long = [axis for axis in order if source.meta[SHAPE][axis] > 1]
    return long != sorted(long) if len(long) == 2 else order != sorted(order)


def _origins(node: fx.Node) -> Iterable[_Origin]:
    """The parameters and buffers that ``node``, which no input feeds, is made from."""
    found: dict[str, _Origin] = {}
    pending: list[tuple[fx.Node, int, bool]] = [(node, 0, False)]
    seen: set[fx.Node] = set()
    while pending:
        current, transposes, computed = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            name = str(current.target)
            found.setdefault(name, _Origin(name, transposes, computed))
        elif is_view(current):
            source = current.all_input_nodes[0]
            pending.append((source, transposes + _is_turned(current, source), computed))
        else:
            pending.extend((source, transposes, True) for source in current.all_input_nodes)
    return found.values()
