"""A torch.fx graph of a model, traced on a weightless copy, and what it tells of norms."""

from __future__ import annotations

import copy
import operator
import random
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from we_surgery.reading.facts import LayerFacts
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
_SHAPE_ATTRIBUTES = frozenset(["shape", "size", "dim", "ndim", "device", "dtype", "numel"])


class LayerTracer(torch.fx.Tracer):
    """A tracer that keeps conv, linear, norm and attention modules, and gates, whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, WEIGHTED) or is_norm(m) or is_gate(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[torch.fx.Graph | None, str]:
    """The graph of ``model``, or None and why it could not be traced.

    The trace runs on a copy whose parameters and buffers are on the meta device: it takes
    no memory of the model's size, and tracing leaves proxies behind in some models.
    """
    python_state = random.getstate()
    try:
        # Some models draw random numbers while they are traced.
        with torch.random.fork_rng(devices=[]):
            return LayerTracer().trace(weightless_copy(model)), ""
    except Exception as error:
        return None, _why(error)
    finally:
        random.setstate(python_state)


def weightless_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` on the meta device, without hooks.

    A hook is a function, which a deep copy shares, and may keep what it is given.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = meta
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    weightless = copy.deepcopy(model, memo)
    for module in weightless.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return weightless


def mark_norms(model: nn.Module, graph: torch.fx.Graph, layers: list[LayerFacts]) -> None:
    """Sets ``followed_by_norm`` for each layer that the graph calls."""
    modules = dict(model.named_modules())
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    for layer in layers:
        nodes = calls.get(layer.module)
        if nodes:
            ends = [end for node in nodes for end in _ends(node, modules)]
            meets = bool(ends) and all(is_norm_end for is_norm_end, _ in ends)
            layer.followed_by_norm = meets
            layer.norm_evidence = (
                f"{ends[0][1]} follows" if meets else next((e for ok, e in ends if not ok), "")
            )


def _ends(node: torch.fx.Node, modules: dict[str, nn.Module]) -> list[tuple[bool, str]]:
    """What each path from ``node`` meets first that is not transparent: (is a norm, its name)."""
    ends: list[tuple[bool, str]] = []
    pending, seen = list(node.users), {node}
    while pending:
        user = pending.pop()
        if user in seen or _reads_shape_only(user):
            continue
        seen.add(user)
        target = modules.get(user.target) if user.op == "call_module" else None  # type: ignore[arg-type]
        if (target is not None and is_norm(target)) or user.target in _NORM_FUNCTIONS:
            ends.append((True, f"{user.target!r}" if user.op == "call_module" else user.name))
        elif _is_transparent(user, target):
            pending.extend(user.users)
        else:
            ends.append((False, _describe(user)))
    return ends


def _is_transparent(node: torch.fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        drops_paths = type(module).__name__ in ("DropPath", "StochasticDepth", "Permute")
        return drops_paths or isinstance(module, _TRANSPARENT_MODULES)
    if node.op == "call_method":
        return node.target in _TRANSPARENT_NAMES
    return node.op == "call_function" and node.target in _TRANSPARENT_FUNCTIONS


def _reads_shape_only(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_ATTRIBUTES
    is_getattr: Callable[..., Any] = getattr
    return (
        node.op == "call_function"
        and (node.target is is_getattr or node.target is operator.attrgetter)
        and len(node.args) > 1
        and node.args[1] in _SHAPE_ATTRIBUTES
    )


def _describe(node: torch.fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node)
    return f"{name!r}" if node.op == "call_module" else f"{name}"


def _why(error: Exception) -> str:
    """The error's first line with the file and line of the model's code that raised it."""
    message = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/we_surgery/" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message}{where}"
