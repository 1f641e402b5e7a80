"""Shift-fed convs, by what the data does: position codes are sent through a recorded slice.

Going back from a conv's input, operations that only move data are followed, and so are norms,
activations and per-element arithmetic, which change values but not positions. What they start
from gets a code for each of its positions; the movements are replayed on these codes; and where
each channel's codes come from tells how it was displaced.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from we_surgery.reading.dataflow import fed_by_input, makes_new, operation_name
from we_surgery.reading.displacement import Shift, find_shift, position_codes
from we_surgery.reading.recorded import Recording
from we_surgery.reading.recorder import DTYPE, SHAPE, after_write

_MOVES = frozenset(
    """
    aten.t aten.transpose aten.permute aten.view aten._unsafe_view aten.reshape aten.expand
    aten.unsqueeze aten.squeeze aten.alias aten.detach aten.contiguous aten.unbind aten.unfold
    aten.slice aten.select aten.split aten.split_with_sizes aten.chunk aten.narrow aten.view_as
    aten.as_strided aten.cat aten.stack aten.roll aten.constant_pad_nd aten.index aten.gather
    aten.index_select aten.take_along_dim aten.flip aten.slice_scatter aten.select_scatter
    aten.copy aten.copy_ aten.index_put aten.index_put_ aten.im2col aten.pixel_shuffle
    aten.pixel_unshuffle aten.channel_shuffle aten.fill_ aten.zero_ aten.repeat aten.lift_fresh
    aten.diagonal aten.clone aten.index_copy aten.index_copy_ aten.where aten.masked_fill
    aten.unsafe_split
    """.split()
)
# They change values and not positions: their first argument's codes pass through.
_POSITIONLESS = frozenset(
    """
    aten.relu aten.relu_ aten.gelu aten.silu aten.silu_ aten.leaky_relu aten.leaky_relu_ aten.elu
    aten.elu_ aten.hardswish aten.hardswish_ aten.hardtanh aten.hardtanh_ aten.sigmoid aten.tanh
    aten.mish aten.softplus aten.clamp aten.clamp_min aten.native_batch_norm aten.cudnn_batch_norm
    aten._native_batch_norm_legit aten._native_batch_norm_legit_no_training aten.batch_norm
    aten._batch_norm_with_update aten.native_layer_norm aten.native_group_norm
    aten.native_dropout aten.dropout aten._to_copy aten.mul aten.mul_ aten.add
    aten.add_ aten.sub aten.sub_ aten.div aten.div_ aten.neg aten._prelu_kernel
    """.split()
)
# A shift needs something that displaces and something that joins; these do both at once.
_DISPLACES = frozenset(
    """
    aten.slice aten.select aten.split aten.split_with_sizes aten.unbind aten.narrow aten.roll
    aten.constant_pad_nd aten.chunk aten.as_strided aten.unsafe_split
    """.split()
)
_JOINS = frozenset(
    """
    aten.cat aten.stack aten.copy_ aten.slice_scatter aten.select_scatter aten.index_put
    aten.index_put_ aten.copy aten.index_copy aten.index_copy_
    """.split()
)
# They take the channels apart and together again where this argument is the channels' dimension.
_DIMENSION = {
    "aten.slice": 1,
    "aten.split": 2,
    "aten.split_with_sizes": 2,
    "aten.unsafe_split": 2,
    "aten.cat": 1,
}
_STAYS = frozenset(["aten.clone", "aten.alias", "aten.detach", "aten.contiguous"])
_DOES_BOTH = frozenset(["aten.gather", "aten.index", "aten.take_along_dim", "aten.as_strided"])
_RESHAPES = frozenset(["aten.view", "aten._unsafe_view", "aten.reshape"])
_EMPTY = frozenset(["aten.zeros", "aten.empty", "aten.full", "aten.ones", "aten.empty_strided"])
_CONVOLUTION = "aten.convolution"


def shift_before(
    data: fx.Node,
    channel_dim: int,
    recording: Recording,
    model: nn.Module,
    fed: set[fx.Node] | None = None,
) -> Shift | None:
    """The shift that made a feature map, or None.

    Args:
        data: what a conv or linear operation is applied to.
        channel_dim: its channels' dimension; may be negative.
        recording: the recording it stands in.
        model: the recorded model, for the values of buffers that serve as indices.
        fed: the nodes that depend on the model's input, where they are known already.

    Raises:
        RuntimeError: a movement cannot be replayed.
    """
    fed = fed_by_input(recording.graph) if fed is None else fed
    tensors = _TensorValues(model, recording.constants)
    inside, sources = _slice(data, fed, tensors)
    if not _may_shift(inside) or _moves_channels_alone(inside, channel_dim):
        return None
    ordered = sorted({*inside, *sources, data})
    for source in sources:
        codes = _replay(data, inside, source, sources, fed, ordered, tensors)
        shift = find_shift(codes, channel_dim % codes.ndim, source.meta[SHAPE])
        if shift is not None:
            return shift
    return None


class _TensorValues:
    """The values of parameters, buffers and other constant tensors by name."""

    def __init__(self, model: nn.Module, constants: Mapping[str, Tensor]) -> None:
        self._model, self._constants = model, constants

    def __getitem__(self, name: str) -> Tensor:
        return self._tensor(name).detach()

    def is_trained(self, name: str) -> bool:
        return self._tensor(name).requires_grad

    def _tensor(self, name: str) -> Tensor:
        if name in self._constants:
            return self._constants[name]
        owner, _, attribute = name.rpartition(".")
        value: Tensor = getattr(self._model.get_submodule(owner), attribute)
        return value


def _slice(
    node: fx.Node, fed: set[fx.Node], tensors: _TensorValues
) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that only move data on the way to ``node``, and what they start from."""
    inside: set[fx.Node] = set()
    sources: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in inside or current in sources:
            continue
        if current not in fed:
            inside.add(current)
            pending.extend([] if makes_new(current) else current.all_input_nodes)
        elif _is_followed(current, fed, tensors):
            inside.add(current)
            pending.extend(current.all_input_nodes)
        else:
            sources[current] = None
    return inside, [_last_form(source, inside) for source in sources]


def _last_form(source: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The source as it is right before data moves: normalized, activated, in its final shape.

    What it passes on the way there is taken out of ``inside``.
    """
    current, passed = source, [source]
    while True:
        followers = [user for user in current.users if user in inside]
        if len(followers) != 1:
            return source
        (current,) = followers
        name = operation_name(current)
        if not (name in _RESHAPES or name in _POSITIONLESS or current.target is operator.getitem):
            return source
        passed.append(current)
        # A norm's own result is no tensor but several; the first of them goes on.
        if SHAPE in current.meta:
            inside.difference_update(passed)
            source = current


def _is_followed(node: fx.Node, fed: set[fx.Node], tensors: _TensorValues) -> bool:
    if node.op != "call_function":
        return False
    if node.target in (operator.getitem, after_write):
        return True
    name = operation_name(node)
    if name in _MOVES:
        return True
    if name == _CONVOLUTION:
        return _is_one_hot_depthwise(node, tensors)
    return name in _POSITIONLESS and sum(n in fed for n in node.all_input_nodes) == 1


def _is_one_hot_depthwise(node: fx.Node, tensors: _TensorValues) -> bool:
    """A depthwise conv whose kernels are fixed and pick one position each."""
    weight, groups = node.args[1], node.args[8]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or groups in (0, 1):
        return False
    value = tensors[str(weight.target)]
    if tensors.is_trained(str(weight.target)) or value.shape[1] != 1 or value.is_meta:
        return False
    kernels = value.flatten(1)
    return bool(((kernels == 1).sum(1) == 1).all() and ((kernels != 0).sum(1) == 1).all())


def _may_shift(inside: set[fx.Node]) -> bool:
    names = {operation_name(node) for node in inside}
    displaces, joins = bool(names & _DISPLACES), bool(names & _JOINS)
    return (displaces and joins) or bool(names & _DOES_BOTH) or _CONVOLUTION in names


def _moves_channels_alone(inside: set[fx.Node], channel_dim: int) -> bool:
    """Whether channels are only cut apart and joined, as in DenseNet, and positions stay."""
    for node in inside:
        name = operation_name(node)
        if name in _DIMENSION:
            index = _DIMENSION[name]
            dimension: Any = node.args[index] if index < len(node.args) else 0
            rank = len(node.all_input_nodes[0].meta.get(SHAPE, ()))
            if not rank or (dimension - channel_dim) % rank:
                return False
        elif name == _CONVOLUTION or (name in _MOVES and name not in _STAYS):
            return False
    return True


def _replay(
    target: fx.Node,
    inside: set[fx.Node],
    source: fx.Node,
    sources: list[fx.Node],
    fed: set[fx.Node],
    ordered: list[fx.Node],
    tensors: _TensorValues,
) -> Tensor:
    """``target`` computed from the codes of ``source``; all other sources are padding."""
    values: dict[fx.Node, Any] = {}
    for node in ordered:
        if node is source:
            values[node] = position_codes(node.meta[SHAPE])
        elif node in sources:
            values[node] = torch.zeros(node.meta[SHAPE], dtype=torch.int64)
        elif node in inside:
            compute = _move if node in fed else _evaluate
            values[node] = compute(node, values, fed, tensors)
        if node is target:
            break
    result: Tensor = values[target]
    return result


def _evaluate(
    node: fx.Node, values: Mapping[fx.Node, Any], fed: set[fx.Node], tensors: _TensorValues
) -> Any:
    """A node that no input feeds: an index, a mask, or an empty tensor to be filled."""
    if node.op == "get_attr":
        return tensors[str(node.target)]
    if makes_new(node) or operation_name(node) in _EMPTY:
        # What codes will be written into must hold them without rounding.
        integral = not node.meta[DTYPE].is_floating_point
        if makes_new(node) or not integral:
            return torch.zeros(node.meta[SHAPE], dtype=torch.int64)
    args, kwargs = _arguments(node, values)
    try:
        return _call(node, args, kwargs)
    except RuntimeError:
        # Arithmetic on a tensor that was made to hold codes, such as a dropout mask: no index.
        if not node.meta[DTYPE].is_floating_point:
            raise
        return torch.zeros(node.meta[SHAPE], dtype=torch.int64)


def _move(
    node: fx.Node, values: Mapping[fx.Node, Any], fed: set[fx.Node], tensors: _TensorValues
) -> Any:
    """A node that the input feeds: its codes, moved or passed through."""
    name = operation_name(node)
    if name in _POSITIONLESS:
        passed = values[next(n for n in node.all_input_nodes if n in fed)]
        if not name.endswith("_"):
            # A new tensor: what is written into the one must not appear in the other.
            passed = passed.clone()
        shape = node.meta.get(SHAPE)
        return passed.expand(shape) if shape is not None and passed.shape != shape else passed
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        # A norm's or dropout's codes are no tuple; its first result is the feature map.
        whole = values[node.args[0]]
        return whole if isinstance(whole, Tensor) else whole[node.args[1]]
    args, kwargs = _arguments(node, values)
    if name == _CONVOLUTION:
        codes, weight, _, *geometry = args
        moved = torch.ops.aten.convolution(codes.double(), weight.double(), None, *geometry)
        return moved.round().long()
    args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
    return _call(node, args, kwargs)


def _without_values(tensor: Tensor) -> Tensor:
    # A constant among the codes, such as a pad value or a class token, stands for padding.
    return torch.zeros_like(tensor, dtype=torch.int64) if tensor.is_floating_point() else tensor


def _arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    return args, kwargs


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.target is after_write:
        return args[0]
    if operation_name(node) in _RESHAPES:
        # Codes may lie in memory in another way than the activations did.
        return args[0].reshape(args[1])
    return node.target(*args, **kwargs)  # type: ignore[operator]
