"""Finds the ends of residual branches by dataflow: a norm or conv that meets its shortcut."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from we_surgery.reading.graph import ModelGraph
from we_surgery.reading.kinds import CONV_KINDS, is_gate, is_norm
from we_surgery.reading.symbolic import trace

_CONVS = tuple(CONV_KINDS)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PASSED = ("Identity", "DropPath", "StochasticDepth", "Dropout", "Dropout2d")


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block, or one of the same class without a shortcut.

    Attributes:
        name: the module that adds, or "".
        type_name: its class, without its module.
        end: the last module of the branch before the addition.
        channels: of its output.
        gate: the class of an attention gate that ends the branch already, or None.
        downsamples: whether it has a conv with a stride.
    """

    name: str
    type_name: str
    end: str
    channels: int
    gate: str | None = None
    downsamples: bool = False


def residual_blocks(model: nn.Module) -> list[ResidualBlock]:
    """The residual blocks of ``model`` in the order in which they run; it is not changed.

    An addition closes a residual block where one operand comes from the other, or both from a
    third, with more convs on one side, the branch, and at most one on the other, the shortcut.
    """
    modules = dict(model.named_modules())
    blocks, _ = trace(model, keeps=is_gate)
    return [found for block in blocks for found in _blocks_of(block, modules)]


def _blocks_of(traced: ModelGraph, modules: Mapping[str, nn.Module]) -> Iterator[ResidualBlock]:
    ends: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        end = _branch_end(node, traced, modules)
        if end is not None:
            ends[end] = _owner(node, traced)
    classes = {type(modules[owner]) for owner in ends.values() if owner}
    last: dict[str, fx.Node] = {}
    for node in traced.graph.nodes:
        for path in _running(node, traced):
            last[path] = node
    with_shortcut = set(ends.values())
    for path, node in last.items():
        if path not in with_shortcut and type(modules.get(path)) in classes:
            ends.setdefault(node, path)
    for node in traced.graph.nodes:
        if node in ends:
            found = _described(node, ends[node], traced, modules)
            if found is not None:
                yield found


def _branch_end(
    node: fx.Node, traced: ModelGraph, modules: Mapping[str, nn.Module]
) -> fx.Node | None:
    """The call that the branch ends in, where the node closes a residual block."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    operands = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    if len(operands) < 2:
        return None
    before = [_ancestors(operand) for operand in operands]
    if not before[0] & before[1]:
        return None
    own = [
        sum(isinstance(_module(n, traced, modules), _CONVS) for n in mine - other)
        for mine, other in (before, before[::-1])
    ]
    if min(own) > 1 or own[0] == own[1]:
        return None
    end = operands[own.index(max(own))]
    while type(_module(end, traced, modules)).__name__ in _PASSED and end.all_input_nodes:
        end = end.all_input_nodes[0]
    return end if end.op == "call_module" else None


def _described(
    node: fx.Node, owner: str, traced: ModelGraph, modules: Mapping[str, nn.Module]
) -> ResidualBlock | None:
    module = _module(node, traced, modules)
    if module is None:
        return None
    gate = type(module).__name__ if is_gate(module) else None
    before: nn.Module | None = module
    source = node
    while before is not None and is_gate(before):
        source = source.all_input_nodes[0]
        before = _module(source, traced, modules)
    channels = 0 if before is None else channels_of(before)
    if not channels:
        return None
    block = modules.get(owner) if owner else None
    inside = () if block is None else block.modules()
    strides: list[Any] = [m.stride for m in inside if isinstance(m, _CONVS)]
    return ResidualBlock(
        name=owner,
        type_name="" if block is None else type(block).__name__,
        end=traced.full_name(str(node.target)),
        channels=channels,
        gate=gate,
        downsamples=any(max(stride) > 1 for stride in strides),
    )


def channels_of(module: nn.Module) -> int:
    """The channels of the maps that a 2-d conv or norm makes; 0 for any other module."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if not is_norm(module) or isinstance(module, nn.LayerNorm):
        return 0
    for name in ("num_features", "num_channels"):
        channels: Any = getattr(module, name, None)
        if isinstance(channels, int):
            return channels
    return 0


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen = {node}
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


def _module(
    node: fx.Node, traced: ModelGraph, modules: Mapping[str, nn.Module]
) -> nn.Module | None:
    return modules.get(traced.full_name(str(node.target))) if node.op == "call_module" else None


def _running(node: fx.Node, traced: ModelGraph) -> list[str]:
    """The modules that were running, from the outermost to the innermost, without a leaf called."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module" and stack and stack[-1] == node.target:
        stack.pop()
    return [traced.full_name(path) for path in stack]


def _owner(node: fx.Node, traced: ModelGraph) -> str:
    running = _running(node, traced)
    return running[-1] if running else traced.prefix
