"""The lowest rung: facts from the module tree alone, without any dataflow."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from we_surgery._util.scripted import is_scripted, own_parameters
from we_surgery.excitations import Composition, WeightLayout
from we_surgery.excitations.names import excitation_name, names_taken, raw_name
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.fetches import excited_names
from we_surgery.reading.graph_calls import GraphRead, graph_reads
from we_surgery.reading.kinds import (
    is_gate,
    is_norm,
    is_shift,
    kind_of,
    standardizes_itself,
)
from we_surgery.reading.source import writes_in_forward

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EXCITABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tree(model: nn.Module, traced: Sequence[GraphRead] = ()) -> list[LayerFacts]:
    """The facts of each weighted layer of ``model``, each Parameter's module once.

    Args:
        model: any model.
        traced: weights outside of weighted layers that a trace has found.
    """
    modules = dict(_modules_outside_excitations(model))
    in_modules = [
        _facts(name, module, parameter, kind)
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None
        for parameter in _weights_of(module, kind)
    ]
    layers = _with_graph_reads([*graph_reads(model), *traced], modules, in_modules)
    _mark_gates(modules, layers)
    _mark_shifts(modules, layers)
    _mark_norms_by_order(modules, in_modules)
    _mark_tied(model, modules, layers)
    return layers


def _modules_outside_excitations(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Composition):
            inside.update(module.modules())
        if module not in inside:
            yield name, module


def _weights_of(module: nn.Module, kind: str) -> tuple[str, ...]:
    if kind != "attention":
        return ("weight",)
    return tuple(name for name in _ATTENTION_WEIGHTS if getattr(module, name, None) is not None)


def _facts(name: str, module: nn.Module, parameter: str, kind: str) -> LayerFacts:
    obstacle = obstacle_of(module, parameter)
    own = own_parameters(module)
    weight = own.get(parameter)
    if weight is None:
        weight = own.get(raw_name(parameter))
    shape = () if weight is None or isinstance(weight, UninitializedParameter) else weight.shape
    transposed = kind.startswith("conv_transpose")
    # A traced conv has lost the number, and is left alone.
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


def _with_graph_reads(
    reads: Sequence[GraphRead], modules: dict[str, nn.Module], layers: list[LayerFacts]
) -> list[LayerFacts]:
    """The layers and the weights that calls of a graph read themselves."""
    names = {module: name for name, module in modules.items()}
    known = {(layer.module, layer.parameter) for layer in layers}
    found: dict[tuple[str, str], LayerFacts] = {}
    for read in reads:
        name = names.get(read.owner)
        if name is None or (name, read.parameter) in known:
            continue
        beside = (name, excitation_name(read.parameter))
        obstacle = read.obstacle or obstacle_of(read.owner, read.parameter)
        if obstacle is None and beside in found:
            obstacle = f"would have its excitation where that of {found[beside].path!r} is"
        facts = LayerFacts(
            module=name,
            parameter=read.parameter,
            kind=read.kind,
            type_name=read.operation,
            layout=read.layout,
            frozen=not read.tensor.requires_grad,
            gate=read.gate,
            followed_by_norm=read.followed_by_norm,
            norm_evidence=read.norm_evidence,
            obstacle=obstacle,
            converted_obstacle=converted_obstacle_of(read.owner, read.parameter),
            constant_input=read.constant_input,
        )
        found.setdefault(beside, facts)
        known.add((name, read.parameter))
        layers = [*layers, facts]
    order = {name: index for index, name in enumerate(modules)}
    return sorted(layers, key=lambda layer: order[layer.module])


def obstacle_of(module: nn.Module, parameter: str) -> str | None:
    """Why the parameter cannot be excited, whatever the policy says."""
    if parameter in excited_names(module):
        return "is excited already"
    if parametrize.is_parametrized(module):
        return "carries a torch.nn.utils.parametrize parametrization"
    if is_scripted(module):
        is_conv = (kind_of(module) or "").startswith("conv")
        if is_conv and not hasattr(module, "groups"):
            return "is a conv in traced TorchScript, which does not say how many groups it has"
        return None
    if f"{parameter}_g" in module._parameters:
        return "carries a torch.nn.utils.weight_norm hook"
    if f"{parameter}_orig" in module._parameters:
        return "carries a spectral_norm hook or a pruning mask"
    weight = module._parameters.get(parameter)
    if weight is None:
        return f"computes its {parameter} in a way of its own"
    if isinstance(weight, UninitializedParameter):
        return "is lazy and has no shape before its first forward"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "belongs to a recurrent layer, which hands its weights over in a way of its own"
    if weight.layout != torch.strided:
        return "has a sparse weight"
    if weight.dtype not in _EXCITABLE_DTYPES:
        return f"has a weight of dtype {weight.dtype}"
    kind: Any = type(module)
    if writes_in_forward(kind, parameter):
        return "is written to in its layer's own forward pass"
    if hasattr(weight, "full_tensor"):
        return "is sharded (a DTensor); convert before fully_shard"
    return None


def converted_obstacle_of(module: nn.Module, parameter: str) -> str | None:
    """Why no excitation of the parameter can stand in the module."""
    if is_scripted(module):
        return "is TorchScript, which cannot be changed"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return "belongs to a container, which would run an excitation as one of its layers"
    if parameter in excited_names(module):
        return None
    taken = [name for name in names_taken(parameter) if hasattr(module, name)]
    return f"has an attribute {taken[0]!r} of its own" if taken else None


def ancestors(name: str) -> Iterator[str]:
    """``a.b``, ``a`` and ``""`` for ``a.b.c``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _mark_gates(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    gates = {name: type(module).__name__ for name, module in modules.items() if is_gate(module)}
    for layer in layers:
        for ancestor in ancestors(layer.module):
            if ancestor in gates:
                layer.gate = f"{gates[ancestor]} at {ancestor!r}"
                break


def _mark_shifts(modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    """By class name and attributes.

    Shift-fed are a shift module's own convs, the first layer anywhere inside it (TSM wraps a
    conv or a whole block), and the layer registered right after it.
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
    """Without dataflow, the order of registration stands for the order of the calls.

    A norm counts that comes right after a layer, in the layer's own module or in one around it:
    one that begins the next block normalizes what a residual block has added first.
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


def _mark_tied(model: nn.Module, modules: dict[str, nn.Module], layers: list[LayerFacts]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for parameter_name, parameter in own_parameters(module).items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{parameter_name}".lstrip("."))
    all_names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        all_names[id(parameter)].append(name)
    excitable = {f"{layer.module}.{layer.parameter}".lstrip(".") for layer in layers}
    blocks = _shared_memory(model)
    for layer in layers:
        weight = own_parameters(modules[layer.module]).get(layer.parameter)
        if weight is None:
            continue
        own = f"{layer.module}.{layer.parameter}".lstrip(".")
        layer.other_names = tuple(n for n in all_names[id(weight)] if n != own)
        holders = owners[id(weight)]
        if len(holders) > 1:
            layer.tied_modules = tuple(holders)
            strangers = [holder for holder in holders if holder not in excitable]
            if strangers and layer.obstacle is None:
                layer.obstacle = f"is tied to {strangers[0]!r}, which is no conv or linear weight"
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
