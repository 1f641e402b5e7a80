"""The swap of one layer's class: from vanilla to excited in place, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from we_surgery.converted.layer import ExcitedLayer, excited_class, excited_names
from we_surgery.converted.own_state import has_own_state, refuse_lost
from we_surgery.converted.views import drop_own_attributes
from we_surgery.errors import SurgeryError
from we_surgery.excitations import Composition
from we_surgery.excitations.names import excitation_name, raw_name, rename_parameter

_TRACED_WHOLE = "torch.nn"

Traced = TypeVar("Traced", bound=nn.Module)


def excite(module: nn.Module, parameter: str, excitation: Composition, layer_name: str) -> None:
    """Makes ``module`` compute ``parameter`` from its raw value, in place.

    The raw tensor is the very Parameter the module had, at the very position it had
    in ``_parameters``: optimizers index their state by position.

    Args:
        module: a module that owns ``parameter``.
        parameter: the parameter's name, such as ``weight`` or ``in_proj_weight``.
        excitation: what computes it; shared between layers that share the Parameter.
        layer_name: the module's name in its model, for error messages.

    Raises:
        SurgeryError: the module's class takes no subclass, or saves its weights in a form of its
            own.
    """
    names = (*excited_names(module), parameter)
    base: Any = module.vanilla_class if isinstance(module, ExcitedLayer) else type(module)
    try:
        swapped = excited_class(base, names)
    except TypeError as error:
        raise SurgeryError(
            f"layer {layer_name!r} is of class {base.__qualname__}, of which no subclass can be "
            f"made: {error}",
            "Leave it alone by a rule (`--skip` on the command line); nothing was changed.",
        ) from error
    rename_parameter(module, parameter, raw_name(parameter))
    module._modules[excitation_name(parameter)] = trace_whole(excitation)
    module.__dict__["layer_name"] = layer_name
    if base.__module__.startswith("torch.nn."):  # torch.fx kept it whole before
        trace_whole(module)
    module.__class__ = swapped
    if has_own_state(base):
        refuse_lost(module, layer_name)  # type: ignore[arg-type]


def trace_whole(module: Traced) -> Traced:
    """Makes torch.fx's own tracers call the module and not enter it; returns it.

    They go by the instance's ``__module__``, and pickle goes by that of the class.
    """
    module.__dict__["__module__"] = _TRACED_WHOLE
    return module


def is_traced_whole(attributes: Mapping[str, Any]) -> bool:
    """Whether these are attributes of a module that :func:`trace_whole` was given."""
    return attributes.get("__module__") == _TRACED_WHOLE


def restore(module: nn.Module) -> None:
    """Undoes :func:`excite`: the vanilla class, with the raw tensors as its parameters."""
    if not isinstance(module, ExcitedLayer):
        return
    for parameter in module.excited_parameters:
        rename_parameter(module, raw_name(parameter), parameter)
        del module._modules[excitation_name(parameter)]
    module.__class__ = module.vanilla_class  # type: ignore[assignment]
    drop_own_attributes(module)


def change_since_conversion(layer: ExcitedLayer) -> str | None:
    """What was done to an excited layer that no fold can undo, or None."""
    for name in map(raw_name, layer.excited_parameters):
        if layer._parameters.get(name) is None:
            return f"its {name!r} is no Parameter any more"
    base: Any = layer.vanilla_class
    if type(layer) is not excited_class(base, layer.excited_parameters):
        return f"its class is {type(layer).__name__} now"
    return None
