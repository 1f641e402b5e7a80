"""Adds excitations to the weights of a model, in place, and removes them.

The owner of an excited weight has the raw tensor under its raw name, and the excitation beside it.
A layer also gets an excited class, which computes the weight when it is read. A module that only
holds a weight for a ``torch.fx`` graph keeps its class; the graph gets a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from we_surgery.converted.fetches import held_by_graphs
from we_surgery.converted.graphs import ExcitedWeight, excited_weights, update_graphs
from we_surgery.converted.layer import ExcitedLayer, excited_class
from we_surgery.converted.views import drop_own_attributes
from we_surgery.errors import SurgeryError
from we_surgery.excitations import Composition
from we_surgery.excitations.names import (
    RAW_PREFIX,
    excitation_name,
    raw_name,
    rename_parameter,
    vanilla_key,
)
from we_surgery.reading.obstacles import excited_names

_TRACED_WHOLE = "torch.nn"
_SAVED_OTHERWISE = (
    "Leave the layer alone by a rule (`--skip` on the command line), or train it with "
    "`we_surgery.attach`, which leaves layers as they are; nothing was changed."
)

Traced = TypeVar("Traced", bound=nn.Module)


@dataclass(frozen=True)
class ExcitationSite:
    """One excitation and its parameter.

    Attributes:
        module: the owner's name in the model.
        parameter: its name in the owner.
        excitation: shared by all sites of one tied Parameter.
        raw: the Parameter's new values, as stored; None keeps the present ones.
    """

    module: str
    parameter: str
    excitation: Composition
    raw: Tensor | None = None


def excite(model: nn.Module, sites: Iterable[ExcitationSite]) -> None:
    """Excites the weights of a model in place."""
    is_held = held_by_graphs(model)
    for site in sites:
        owner = model.get_submodule(site.module)
        site.excitation.train(owner.training)
        parameter = owner._parameters[site.parameter]
        if site.raw is not None and parameter is not None:
            parameter.data = site.raw
        name = None if is_held(owner, site.parameter) else site.module or "(the model itself)"
        excite_owner(owner, site.parameter, site.excitation, name)
    update_graphs(model)
    _refuse_lost(model)


def restore(model: nn.Module, owners: Iterable[nn.Module]) -> None:
    """Undoes :func:`excite` for some owners of ``model``; raw weights become the weights."""
    for owner in owners:
        restore_owner(owner)
    update_graphs(model)


def excite_owner(
    owner: nn.Module, parameter: str, excitation: Composition, layer_name: str | None
) -> None:
    """Excites one parameter of a module.

    The raw weight is the module's own Parameter, at its position in ``_parameters``: optimizers
    index their state by position. With ``layer_name`` None the module holds the parameter for a
    graph, and keeps its class.
    """
    swapped = None if layer_name is None else _swapped_class(owner, parameter, layer_name)
    rename_parameter(owner, parameter, raw_name(parameter))
    owner._modules[excitation_name(parameter)] = trace_whole(excitation)
    if swapped is None or layer_name is None:
        return
    owner.__dict__["layer_name"] = layer_name
    if swapped.vanilla_class.__module__.startswith("torch.nn."):  # torch.fx kept it whole before
        trace_whole(owner)
    owner.__class__ = swapped


def restore_owner(owner: nn.Module) -> None:
    """Undoes :func:`excite_owner` for all parameters of the module."""
    for parameter in excited_names(owner):
        rename_parameter(owner, raw_name(parameter), parameter)
        del owner._modules[excitation_name(parameter)]
    if isinstance(owner, ExcitedLayer):
        owner.__class__ = owner.vanilla_class  # type: ignore[assignment]
        drop_own_attributes(owner)


def _swapped_class(owner: nn.Module, parameter: str, layer_name: str) -> type[ExcitedLayer]:
    base: Any = owner.vanilla_class if isinstance(owner, ExcitedLayer) else type(owner)
    names = (*excited_names(owner), parameter)
    try:
        return excited_class(base, names)
    except TypeError as error:
        raise SurgeryError(
            f"layer {layer_name!r} is of class {base.__qualname__}, which cannot be subclassed: "
            f"{error}",
            "Leave it alone by a rule (`--skip` on the command line); nothing was changed.",
        ) from error


def _refuse_lost(model: nn.Module) -> None:
    """Raises if the model's state dict lacks a raw weight, or also holds the excited one.

    Classes, their parents and hooks may save weights differently.
    """
    try:
        state = model.state_dict()
    except Exception as error:
        raise SurgeryError(
            "the model's own code for its state dict fails on excited layers: "
            f"{type(error).__name__}: {error}",
            _SAVED_OTHERWISE,
        ) from error
    saved: dict[tuple[Any, ...], list[str]] = {}
    for key, value in state.items():
        if key.rpartition(".")[2].startswith(RAW_PREFIX) and isinstance(value, Tensor):
            saved.setdefault(_place(value), []).append(key)
    for weight in excited_weights(model):
        keys = saved.get(_place(weight.raw), [])
        if not keys or any(vanilla_key(key) in state for key in keys):
            raise _lost(weight)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def _lost(weight: ExcitedWeight) -> SurgeryError:
    owner = weight.owner
    kind = owner.vanilla_class if isinstance(owner, ExcitedLayer) else type(owner)
    return SurgeryError(
        f"layer {weight.name!r} ({kind.__qualname__}) would not save its raw {weight.parameter}: "
        "its class, a parent or a hook makes the state dict in its own way",
        _SAVED_OTHERWISE,
    )


def trace_whole(module: Traced) -> Traced:
    """Makes torch.fx's tracers call the module instead of entering it; returns it.

    They look at the instance's ``__module__``, pickle at the class's.
    """
    module.__dict__["__module__"] = _TRACED_WHOLE
    return module


def is_traced_whole(attributes: Mapping[str, Any]) -> bool:
    """Whether these attributes belong to a module that :func:`trace_whole` has marked."""
    return attributes.get("__module__") == _TRACED_WHOLE


def change_since_conversion(layer: ExcitedLayer) -> str | None:
    """A change to an excited layer that prevents folding, or None."""
    for name in map(raw_name, layer.excited_parameters):
        if layer._parameters.get(name) is None:
            return f"its {name!r} is not a Parameter any more"
    base: Any = layer.vanilla_class
    if type(layer) is not excited_class(base, layer.excited_parameters):
        return f"its class is {type(layer).__name__} now"
    return None
