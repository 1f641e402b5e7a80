"""The listed reading: facts from the module tree alone, without dataflow."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from we_surgery._util.scripted import own_parameters
from we_surgery.excitations import Composition, WeightLayout
from we_surgery.excitations.names import raw_name
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.graph import join
from we_surgery.reading.kinds import (
    is_gate,
    is_norm,
    is_shift,
    kind_of,
    standardizes_itself,
    weights_of,
)
from we_surgery.reading.obstacles import converted_obstacle_of, obstacle_of, written_in_forward


def list_layers(model: nn.Module) -> list[LayerFacts]:
    """The facts of each weighted layer of ``model``, each Parameter's module once."""
    modules = dict(_modules_outside_excitations(model))
    layers = [
        _facts(name, module, parameter, kind)
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None
        for parameter in weights_of(module, kind)
    ]
    _mark_written(modules, layers)
    _mark_gates(modules, layers)
    _mark_shifts(modules, layers)
    _mark_norms_by_order(modules, layers)
    return layers


def _modules_outside_excitations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Composition):
            inside.update(module.modules())
        if module not in inside:
            yield name, module


def _facts(name: str, module: nn.Module, parameter: str, kind: str) -> LayerFacts:
    obstacle = obstacle_of(module, parameter)
    own = own_parameters(module)
    weight = own.get(parameter)
    if weight is None:
        weight = own.get(raw_name(parameter))
    shape = () if weight is None or isinstance(weight, UninitializedParameter) else weight.shape
    transposed = kind.startswith("conv_transpose")
    # A traced conv has no `groups`, and is not excited.
    groups = getattr(module, "groups", 1) if kind.startswith("conv") else 1
    return LayerFacts(
        module=name,
        parameter=parameter,
        kind=kind,
        type_name=f"{type(module).__module__}.{type(module).__qualname__}",
        layout=WeightLayout(tuple(shape), int(groups), transposed),
        frozen=weight is not None and not weight.requires_grad,
        standardizes_itself=standardizes_itself(module),
        obstacle=obstacle,
        converted_obstacle=converted_obstacle_of(module, parameter),
    )


def ancestors(name: str) -> Iterator[str]:
    """``a.b``, ``a`` and ``""`` for ``a.b.c``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _mark_written(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    """By the source of the forwards around a layer."""
    for layer in layers:
        for ancestor in ancestors(layer.module) if layer.obstacle is None else ():
            path = layer.path.removeprefix(f"{ancestor}." if ancestor else "")
            kind: Any = type(modules[ancestor])
            if path in written_in_forward(kind):
                layer.obstacle = f"is written to in the forward pass of {kind.__name__}"
                break


def _mark_gates(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    gates = {name: type(module).__name__ for name, module in modules.items() if is_gate(module)}
    for layer in layers:
        for ancestor in ancestors(layer.module):
            if ancestor in gates:
                layer.gate = f"{gates[ancestor]} at {ancestor!r}"
                break


def _mark_shifts(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    """Marks shift-fed layers by class names and attributes of shift modules.

    They are a shift module's own convs, the first layer anywhere inside it (TSM wraps a conv or a
    block), and the layer registered right after it.
    """
    shifts = [name for name, module in modules.items() if is_shift(module)]
    sources: dict[str, str] = {}
    for shift in shifts:
        prefix = f"{shift}." if shift else ""
        inside = [layer.module for layer in layers if layer.module.startswith(prefix)]
        direct = [name for name in inside if name.rpartition(".")[0] == shift]
        sources |= dict.fromkeys([*inside[:1], *direct], shift)
    sources |= {after: before for before, after in itertools.pairwise(modules) if before in shifts}
    for layer in layers:
        source = sources.get(layer.module)
        if source is not None and layer.kind != "attention":
            layer.shift = f"by {type(modules[source]).__name__} at {source!r}, by its class"


def _mark_norms_by_order(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    """Takes the order of registration for the order of calls.

    A norm counts if it comes right after a layer, in its module or one around it. A norm at the
    start of the next block does not: it normalizes the sum of a residual block.
    """
    whole: list[str] = []
    for name, module in modules.items():
        is_part = bool(whole) and name.startswith(f"{whole[-1]}.")
        if not is_part and (not list(module.children()) or is_norm(module)):
            whole.append(name)
    following = dict(itertools.pairwise(whole))
    for layer in layers:
        norm = following.get(layer.module)
        around = norm is not None and norm.rpartition(".")[0] in ancestors(layer.module)
        if norm is not None and around and is_norm(modules[norm]):
            layer.followed_by_norm = True
            layer.norm_evidence = f"{norm!r} is registered after it"


def mark_ties(model: nn.Module, layers: list[LayerFacts]) -> None:
    """Sets ``tied_modules``; what cannot be tied is an obstacle."""
    modules = dict(_modules_outside_excitations(model))
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for parameter_name, parameter in own_parameters(module).items():
            if parameter is not None:
                owners[id(parameter)].append(join(name, parameter_name))
    excitable = {layer.path for layer in layers}
    blocks = _shared_memory(model)
    for layer in layers:
        weight = own_parameters(modules[layer.module]).get(layer.parameter)
        if weight is None:
            continue
        holders = owners[id(weight)]
        if len(holders) > 1:
            layer.tied_modules = tuple(holders)
            strangers = [holder for holder in holders if holder not in excitable]
            if strangers and layer.obstacle is None:
                stranger = strangers[0]
                layer.obstacle = f"is tied to {stranger!r}, which is not a conv or linear weight"
        if layer.obstacle is None and id(weight) in blocks:
            layer.obstacle = f"shares memory with {blocks[id(weight)]!r}"


def _shared_memory(model: nn.Module) -> dict[int, str]:
    """Parameters that are distinct objects over one memory block, each with one other's name."""
    by_block: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
            continue
        try:
            address = parameter.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # fake and wrapper tensors have no memory
            continue
        if address:
            by_block[address].append((name, parameter))
    return {
        id(parameter): next(other for other, _ in block if other != name)
        for block in by_block.values()
        if len(block) > 1
        for name, parameter in block
    }
