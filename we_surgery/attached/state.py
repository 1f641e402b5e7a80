"""The state of an attached excitation, as saved in the optimizer's state dict."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.attached.shards import local, put
from we_surgery.attached.step import OptimizerStep
from we_surgery.attached.weights import AttachedWeight, ExcitationParameter
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.errors import AttachmentError, InputError

VERSION = 1


def state_of(each: Sequence[OptimizerStep], plan: str) -> dict[str, Any]:
    """Raw weights, excitations, and what the optimizers keep for these, by name.

    It holds tensors, text and numbers alone, so that ``torch.load(weights_only=True)`` opens it.
    Tensors are references, as in any state dict.
    """
    return {
        "version": VERSION,
        "plan": plan,
        "steps": max((step.steps for step in each), default=0),
        "weights": {
            weight.name: _weight_state(weight, step) for step in each for weight in step.weights
        },
        "optimizer": {
            own.name: [_plain(kept) for kept in own.states]
            for step in each
            for own in step.parameters
        },
    }


def _weight_state(weight: AttachedWeight, step: OptimizerStep) -> dict[str, Any]:
    found: dict[str, Any] = {
        "raw": weight.raw.detach(),
        "excitation": dict(weight.excitation.state_dict()),
    }
    if weight.raw.dtype != weight.parameter.dtype:
        # Torch casts the optimizer's own entries to the Parameter's dtype when it loads them.
        states = (layer.state.get(weight.parameter, {}) for layer in with_wrapped(step.optimizer))
        found["states"] = [dict(kept) for kept in states]
    return found


def parts_of(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A state split into one per weight, by name; the first has the plan."""
    parts: dict[str, dict[str, Any]] = {}
    for name, own in state["weights"].items():
        states = state["optimizer"].items()
        parts[name] = {
            "version": state["version"],
            "steps": state["steps"],
            "weights": {name: own},
            "optimizer": {key: kept for key, kept in states if key.partition(":")[0] == name},
        }
        if len(parts) == 1:
            parts[name]["plan"] = state["plan"]
    return parts


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins states, such as those of several optimizers."""
    whole = {key: value for part in parts for key, value in part.items()}
    for key in ("weights", "optimizer"):
        whole[key] = {name: own for part in parts for name, own in part.get(key, {}).items()}
    return whole


def check_state(
    state: Any, weights: Sequence[AttachedWeight], parameters: Sequence[ExcitationParameter]
) -> None:
    """Raises if the state does not fit these weights."""
    if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping):
        raise InputError(
            "this is not the state of an attached excitation",
            "Give what `excitation.state_dict()` returned, or the state dict of a converted model.",
        )
    if state.get("version") != VERSION:
        raise InputError(
            f"the excitation's state has version {state.get('version')!r}; this version of "
            f"we_surgery reads {VERSION}",
            "Install the version of we_surgery that wrote it.",
        )
    saved, own = state["weights"], {weight.name: weight for weight in weights}
    if saved.keys() != own.keys():
        differing = sorted(saved.keys() ^ own.keys())
        raise AttachmentError(
            f"the saved excitation is of {len(saved)} weights and this one of {len(own)}; "
            f"{differing[0]!r} is in only one of them",
            "Attach with the mode, config and rules of the run that saved it, or with its plan.",
        )
    for name, weight in own.items():
        there, here = saved[name]["excitation"], weight.excitation.state_dict()
        if saved[name]["raw"].shape != weight.raw.shape or there.keys() != here.keys():
            raise AttachmentError(
                f"the saved excitation of {name!r} has other stages than this one: "
                f"{', '.join(sorted(there)) or 'none'}",
                "Attach with the mode, config and rules of the run that saved it, or with its "
                "plan.",
            )
    if state["optimizer"].keys() != {each.name for each in parameters}:
        raise AttachmentError(
            "the saved excitation has other trained parameters than this one",
            "Attach with the same optimizer and frozen layers as the run that saved it.",
        )


@torch.no_grad()
def load_state(state: Mapping[str, Any], step: OptimizerStep) -> None:
    """Copies a checked state into the step's raw weights, excitations and optimizer states."""
    for weight in step.weights:
        saved = state["weights"][weight.name]
        put(weight.raw, saved["raw"], weight.shard)
        weight.excitation.load_state_dict(saved["excitation"])
        for layer, kept in zip(with_wrapped(step.optimizer), saved.get("states", ()), strict=False):
            if kept:
                layer.state[weight.parameter] = {
                    key: _raw_like(value, weight) for key, value in kept.items()
                }
    for own in step.parameters:
        states = state["optimizer"][own.name]
        own.states = [_copied(kept, own) for kept in states]
    step.steps = int(state.get("steps", 0))


def _plain(value: Any) -> Any:
    """The state without DTensors; each rank holds it whole."""
    if isinstance(value, Tensor):
        return local(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _raw_like(value: Any, weight: AttachedWeight) -> Any:
    """A copy of what an optimizer keeps for a raw weight, on its device and rows."""
    if not isinstance(value, Tensor) or value.shape != weight.raw.shape or not value.ndim:
        return copy.deepcopy(value)
    found = torch.empty_like(weight.raw, dtype=value.dtype)
    put(found, value, weight.shard)
    return found


def _copied(value: Any, own: ExcitationParameter) -> Any:
    if isinstance(value, Tensor):
        if not value.ndim:
            return value.clone()  # as torch loads an optimizer's state: step counts do not move
        moved = value.to(own.parameter.device, copy=True)
        return moved if own.replicated is None else own.replicated(moved).data
    if isinstance(value, Mapping):
        return {key: _copied(each, own) for key, each in value.items()}
    return value
