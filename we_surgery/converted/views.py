"""A vanilla view of an excited layer, with other values for its excited parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.excitations.cached import uncached
from we_surgery.excitations.names import excitation_name, raw_name, rename_parameter


def vanilla_view(layer: Any, values: Mapping[str, Tensor]) -> nn.Module:
    """A vanilla layer that shares everything but the excited parameters with an excited one."""
    view: nn.Module = layer.vanilla_class.__new__(layer.vanilla_class)
    view.__dict__.update(layer.__dict__)
    view.__dict__["_parameters"] = dict(layer._parameters)
    view.__dict__["_modules"] = dict(layer._modules)
    for name, value in values.items():
        rename_parameter(view, raw_name(name), name)
        view._parameters[name] = value  # type: ignore[assignment]
        del view._modules[excitation_name(name)]
    drop_own_attributes(view)
    return view


def raw_view(layer: Any) -> nn.Module:
    """A vanilla layer that has the raw weights of an excited one."""
    raw = {name: layer._parameters[raw_name(name)] for name in layer.excited_parameters}
    return vanilla_view(layer, raw)


def drop_own_attributes(module: nn.Module) -> None:
    """Removes the entries of ``__dict__`` that a vanilla layer does not have."""
    for name in ("layer_name", "__module__"):
        module.__dict__.pop(name, None)


def folded_parameters(layer: Any) -> dict[str, nn.Parameter]:
    """The layer's excited weights as new Parameters, with the raw ones' ``requires_grad``."""
    folded = {}
    for name in layer.excited_parameters:
        raw: Tensor = getattr(layer, raw_name(name))
        with torch.inference_mode(False), torch.no_grad(), uncached():
            values = own_memory(getattr(layer, name).detach(), raw)
        folded[name] = nn.Parameter(values, requires_grad=raw.requires_grad)
    return folded


def own_memory(excited: Tensor, raw: Tensor) -> Tensor:
    """A computed weight as a tensor that shares memory with no other."""
    # An excitation without effect returns its input.
    if excited.is_meta or excited.untyped_storage().data_ptr() != raw.untyped_storage().data_ptr():
        return excited
    return excited.clone(memory_format=torch.preserve_format)
