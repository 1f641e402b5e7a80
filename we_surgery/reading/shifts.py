"""Finds shift-fed convs by dataflow: position codes are sent through a slice of a recorded graph.

The slice goes back from a conv's input through operations that move data, and through norms,
activations and per-element arithmetic, which change values but not positions. Each position of its
sources gets a code, the movements are replayed on these codes, and the codes that arrive show how
each channel was displaced.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from we_surgery.reading.displacement import Shift, find_shift, position_codes
from we_surgery.reading.graph import (
    DTYPE,
    SHAPE,
    ModelGraph,
    after_write,
    called_name,
    makes_new,
    operation_name,
)

_MOVES = frozenset(
    """
    t transpose permute view unsafeview reshape expand unsqueeze squeeze alias detach contiguous
    unbind unfold slice select split splitwithsizes chunk narrow viewas asstrided cat stack roll
    constantpadnd index gather indexselect takealongdim flip slicescatter selectscatter copy
    indexput im2col pixelshuffle pixelunshuffle channelshuffle fill zero repeat liftfresh
    diagonal clone indexcopy where maskedfill unsafesplit
    """.split()
)
# They change values, not positions: the codes of their first argument pass through.
_POSITIONLESS = frozenset(
    """
    relu gelu silu leakyrelu elu hardswish hardtanh sigmoid tanh mish softplus clamp clampmin
    nativebatchnorm cudnnbatchnorm nativebatchnormlegit nativebatchnormlegitnotraining batchnorm
    batchnormwithupdate nativelayernorm nativegroupnorm nativedropout dropout tocopy mul add sub
    div neg prelukernel
    """.split()
)
# A shift needs something that displaces and something that joins; these do both at once.
_DISPLACES = frozenset(
    """
    slice select split splitwithsizes unbind narrow roll constantpadnd chunk asstrided
    unsafesplit
    """.split()
)
_JOINS = frozenset("cat stack copy slicescatter selectscatter indexput indexcopy".split())
# They cut or join channels if this argument is the channels' dimension.
_DIMENSION = {"slice": 1, "split": 2, "splitwithsizes": 2, "unsafesplit": 2, "cat": 1}
_STAYS = frozenset(["clone", "alias", "detach", "contiguous"])
_DOES_BOTH = frozenset(["gather", "index", "takealongdim", "asstrided"])
_RESHAPES = frozenset(["view", "unsafeview", "reshape"])
_EMPTY = frozenset(["zeros", "empty", "full", "ones", "emptystrided"])


def shift_before(data: fx.Node, channel_dim: int, graph: ModelGraph) -> Shift | None:
    """The shift that made ``data``, the input of a conv or linear operation, or None."""
    inside, sources = _slice(data, graph)
    if not _may_shift(inside) or _moves_channels_alone(inside, channel_dim):
        return None
    ordered = sorted({*inside, *sources, data})
    for source in sources:
        codes = _Replay(inside, source, sources, graph).value_of(data, ordered)
        shift = find_shift(codes, channel_dim % codes.ndim, source.meta[SHAPE])
        if shift is not None:
            return shift
    return None


def _slice(node: fx.Node, graph: ModelGraph) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that only move data on the way to ``node``, and what they start from."""
    inside: set[fx.Node] = set()
    sources: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in inside or current in sources:
            continue
        if current not in graph.fed:
            inside.add(current)
            pending.extend([] if makes_new(current) else current.all_input_nodes)
        elif _is_followed(current, graph):
            inside.add(current)
            pending.extend(current.all_input_nodes)
        else:
            sources[current] = None
    return inside, [_last_form(source, inside) for source in sources]


def _last_form(source: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The source right before data moves: normalized, activated, in its final shape.

    The nodes on the way are removed from ``inside``.
    """
    current, passed = source, [source]
    while True:
        followers = [user for user in current.users if user in inside]
        if len(followers) != 1:
            return source
        (current,) = followers
        name = called_name(current)
        if not (name in _RESHAPES or name in _POSITIONLESS or current.target is operator.getitem):
            return source
        passed.append(current)
        # A norm returns several tensors; the first one is the map.
        if SHAPE in current.meta:
            inside.difference_update(passed)
            source = current


def _is_followed(node: fx.Node, graph: ModelGraph) -> bool:
    if node.op != "call_function":
        return False
    if node.target in (operator.getitem, after_write):
        return True
    name = called_name(node)
    if name in _MOVES:
        return True
    if name == "convolution":
        return _is_one_hot_depthwise(node, graph)
    return name in _POSITIONLESS and sum(n in graph.fed for n in node.all_input_nodes) == 1


def _is_one_hot_depthwise(node: fx.Node, graph: ModelGraph) -> bool:
    """A depthwise conv whose kernels are fixed and pick one position each."""
    weight, groups = node.args[1], node.args[8]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or groups in (0, 1):
        return False
    value = graph.value(str(weight.target))
    if value.requires_grad or value.shape[1] != 1 or value.is_meta:
        return False
    kernels = value.flatten(1)
    return bool(((kernels == 1).sum(1) == 1).all() and ((kernels != 0).sum(1) == 1).all())


def _may_shift(inside: set[fx.Node]) -> bool:
    names = {called_name(node) for node in inside}
    displaces, joins = bool(names & _DISPLACES), bool(names & _JOINS)
    return (displaces and joins) or bool(names & _DOES_BOTH) or "convolution" in names


def _moves_channels_alone(inside: set[fx.Node], channel_dim: int) -> bool:
    """Whether channels are only cut apart and joined, as in DenseNet, and positions stay."""
    for node in inside:
        name = called_name(node)
        if name in _DIMENSION:
            index = _DIMENSION[name]
            dimension: Any = node.args[index] if index < len(node.args) else 0
            rank = len(node.all_input_nodes[0].meta.get(SHAPE, ()))
            if not rank or (dimension - channel_dim) % rank:
                return False
        elif name == "convolution" or (name in _MOVES and name not in _STAYS):
            return False
    return True


class _Replay:
    """Sends the codes of one source through a slice; all other sources are padding."""

    def __init__(
        self, inside: set[fx.Node], source: fx.Node, sources: list[fx.Node], graph: ModelGraph
    ) -> None:
        self._inside, self._graph = inside, graph
        self._values: dict[fx.Node, Any] = {
            other: torch.zeros(other.meta[SHAPE], dtype=torch.int64) for other in sources
        }
        self._values[source] = position_codes(source.meta[SHAPE])

    def value_of(self, target: fx.Node, ordered: list[fx.Node]) -> Tensor:
        """The codes that arrive at a node; ``ordered`` are all nodes of the slice."""
        for node in ordered:
            if node in self._inside and node not in self._values:
                compute = self._move if node in self._graph.fed else self._evaluate
                self._values[node] = compute(node)
            if node is target:
                break
        result: Tensor = self._values[target]
        return result

    def _evaluate(self, node: fx.Node) -> Any:
        """A node that no input feeds: an index, a mask, or an empty tensor to be filled."""
        if node.op == "get_attr":
            return self._graph.value(str(node.target)).detach()
        is_empty = called_name(node) in _EMPTY and node.meta[DTYPE].is_floating_point
        if is_empty or makes_new(node):
            # Codes will be written into it, without rounding.
            return torch.zeros(node.meta[SHAPE], dtype=torch.int64)
        args, kwargs = self._arguments(node)
        try:
            return _call(node, args, kwargs)
        except RuntimeError:
            # Arithmetic on a tensor made to hold codes, such as a dropout mask; not an index.
            if not node.meta[DTYPE].is_floating_point:
                raise
            return torch.zeros(node.meta[SHAPE], dtype=torch.int64)

    def _move(self, node: fx.Node) -> Any:
        """A node that the input feeds: its codes, moved or passed through."""
        name = called_name(node)
        if name in _POSITIONLESS:
            passed = self._values[next(n for n in node.all_input_nodes if n in self._graph.fed)]
            if not operation_name(node).endswith("_"):
                # A new tensor: later writes into one must not appear in the other.
                passed = passed.clone()
            shape = node.meta.get(SHAPE)
            return passed.expand(shape) if shape is not None and passed.shape != shape else passed
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            # The codes of a norm or dropout are not a tuple; its first result is the map.
            whole = self._values[node.args[0]]
            return whole if isinstance(whole, Tensor) else whole[node.args[1]]
        args, kwargs = self._arguments(node)
        if name == "convolution":
            codes, weight, _, *geometry = args
            moved = torch.ops.aten.convolution(codes.double(), weight.double(), None, *geometry)
            return moved.round().long()
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return _call(node, args, kwargs)

    def _arguments(self, node: fx.Node) -> tuple[Any, Any]:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        return args, kwargs


def _without_values(tensor: Tensor) -> Tensor:
    # Constants among the codes, such as pad values or class tokens, count as padding.
    return torch.zeros_like(tensor, dtype=torch.int64) if tensor.is_floating_point() else tensor


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.target is after_write:
        return args[0]
    if called_name(node) in _RESHAPES:
        # Codes may have other strides than the activations.
        return args[0].reshape(args[1])
    return node.target(*args, **kwargs)  # type: ignore[operator]
