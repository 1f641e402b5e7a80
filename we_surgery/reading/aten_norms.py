"""Whether a norm follows an operation, on a recorded graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from we_surgery.reading.kinds import is_norm
from we_surgery.reading.recorder import MODULE
from we_surgery.reading.weight_use import is_view, operation_name

_NORM_OPERATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
# Linear in a feature map and alike for all its channels: a scale passes through.
_TRANSPARENT = frozenset(
    """
    aten.avg_pool1d aten.avg_pool2d aten.avg_pool3d aten._adaptive_avg_pool2d
    aten._adaptive_avg_pool3d aten.mean aten.roll aten.constant_pad_nd aten.index
    aten.native_dropout aten.pixel_shuffle aten.pixel_unshuffle aten.dropout aten.pad
    aten.flatten aten.unflatten aten.adaptive_avg_pool1d aten.adaptive_avg_pool2d
    aten.adaptive_avg_pool3d
    """.split()
)


def is_norm_operation(node: fx.Node) -> bool:
    """Whether the node is an aten operation that normalizes."""
    operation = operation_name(node)
    return any(name in operation for name in _NORM_OPERATIONS)


def passes_scale(node: fx.Node) -> bool:
    """Whether the node is an aten operation after which a change of scale is the same one."""
    operation = operation_name(node)
    return bool(operation) and (operation in _TRANSPARENT or is_view(node))


def norm_after(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[bool, str]:
    """Whether every path from ``node`` meets a norm first, and what it meets.

    Args:
        node: an operation of a recorded graph.
        modules: the model's modules by name; a norm that a module spells out in elementary
            operations is known by its class.

    Returns:
        True with the norm's module (or operation), or False with what comes instead.
    """
    met: list[str] = []
    pending, seen = list(node.users), {node}
    while pending:
        user = pending.pop()
        # What nobody uses is a question about the tensor, such as its device.
        if user in seen or (not user.users and user.op != "output"):
            continue
        seen.add(user)
        runner = user.meta.get(MODULE, "")
        operation = operation_name(user)
        owner = modules.get(runner)
        spelled_out = runner != node.meta[MODULE] and owner is not None and is_norm(owner)
        if spelled_out or is_norm_operation(user):
            met.append(repr(runner) if runner else operation)
        elif is_view(user) or operation in _TRANSPARENT:
            pending.extend(user.users)
        else:
            return False, "the model's output" if user.op == "output" else operation
    return bool(met), met[0] if met else ""
