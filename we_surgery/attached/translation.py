"""Translates between the attached and the converted form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from we_surgery._util.copies import copy_model
from we_surgery.attached.weights import AttachedWeight
from we_surgery.converted.excite import ExcitationSite, excite
from we_surgery.errors import AttachmentError, InputError
from we_surgery.excitations.names import RAW_PREFIX, excitation_name
from we_surgery.reading import converted_obstacle_of


def converted_twin(model: nn.Module, weights: Sequence[AttachedWeight]) -> nn.Module:
    """A converted copy of the model."""
    if any(weight.shard is not None for weight in weights):
        raise InputError(
            "the model is sharded, so no rank has all of it",
            "Attach to an unsharded model with `resume=excitation.state_dict()`, gathered.",
        )
    for weight in weights:
        for module, parameter in weight.places:
            obstacle = converted_obstacle_of(model.get_submodule(module), parameter)
            if obstacle is not None:
                raise InputError(
                    f"there is no converted form of layer {weight.layer!r}, which {obstacle}",
                    "Leave that layer alone by a rule, or go on in the attached form.",
                )
    twin = copy_model(model)
    memo: dict[int, Any] = {}
    sites = []
    for weight in weights:
        excitation = copy.deepcopy(weight.excitation, memo)
        raw = weight.raw.detach().to(weight.parameter.dtype, copy=True)
        for position, (module, parameter) in enumerate(weight.places):
            sites.append(ExcitationSite(module, parameter, excitation, None if position else raw))
    excite(twin, sites)
    return twin


def from_converted(
    state: Mapping[str, Any], own: dict[str, Any], weights: Sequence[AttachedWeight]
) -> dict[str, Any] | None:
    """The state of these weights from a converted model's state dict; None if it is not one."""
    there = _converted_weights(state) if isinstance(state, Mapping) else {}
    if not there:
        return None
    found: dict[str, dict[str, Any]] = {}
    for weight in weights:
        for place in weight.places:  # tied weights have an entry each, with the same values
            saved = there.pop(".".join(part for part in place if part), None)
            if saved is not None:
                found[weight.name] = saved
    if there:
        raise AttachmentError(
            f"the converted model excites {next(iter(there))!r}, which is not excited here",
            "Attach with the mode, config and rules of the conversion, or with its plan.",
        )
    return {**own, "steps": 0, "weights": found}


def _converted_weights(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    state = {key: value for key, value in state.items() if isinstance(key, str)}
    for key, raw in state.items():
        layer, dot, last = key.rpartition(".")
        parameter = last.removeprefix(RAW_PREFIX)
        prefix = f"{layer}{dot}{excitation_name(parameter)}."
        if parameter != last:
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:
                found[f"{layer}{dot}{parameter}"] = {"raw": raw, "excitation": own}
    return found
