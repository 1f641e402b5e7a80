"""Checkpoints of attached runs: vanilla weights, and the excitation in the optimizer's state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from we_surgery.checkpoint.excited_entry import ExcitedEntry, tensor_identity
from we_surgery.errors import InputError
from we_surgery.plans import Plan

_KEYS = frozenset({"version", "plan", "steps", "weights"})
_DEEPEST = 5
_MOST_ENTRIES = 100
"""Of a list: trainers keep a few optimizers in one, and other lists may be long."""


@dataclass(frozen=True)
class AttachedRun:
    """The state of an attached excitation, as a checkpoint holds it.

    Attributes:
        weights: the raw weight and the excitation's entries of each, by the weight's key.
        plan: what each weight got.
        steps: how many optimizer steps have moved them.
    """

    weights: Mapping[str, ExcitedEntry]
    plan: Plan
    steps: int

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the converted form, in the order of the vanilla one.

        Args:
            state: of the model, with the excited weights. Tied weights share their memory.

        Raises:
            InputError: it lacks a weight, or has it in another shape.
        """
        entries: dict[tuple[Any, ...], ExcitedEntry] = {}
        for key, entry in self.weights.items():
            if key not in state or state[key].shape != entry.raw.shape:
                raise InputError(
                    f"the checkpoint's optimizer excites {key!r} {tuple(entry.raw.shape)}, and "
                    "its model has no such weight",
                    "Give the checkpoint as training saved it.",
                )
            entries[tensor_identity(state[key])] = entry
        converted: dict[str, Tensor] = {}
        for key, value in state.items():
            first = entries.get(tensor_identity(value))
            if first is None:
                converted[key] = value
                continue
            layer, _, parameter = key.rpartition(".")
            own = ExcitedEntry(layer, parameter, first.raw, first.excitation)
            converted[own.raw_key] = own.raw
            converted |= {own.excitation_prefix + k: v for k, v in own.excitation.items()}
        return converted


def find_attached_run(checkpoint: Mapping[str, Any]) -> AttachedRun | None:
    """The state of an attached excitation, wherever a trainer put it; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    found = _search(checkpoint, 0)
    if found is None:
        return None
    weights: dict[str, ExcitedEntry] = {}
    for key, saved in found["weights"].items():
        parts = saved if isinstance(saved, Mapping) else {}
        raw, excitation = parts.get("raw"), parts.get("excitation", {})
        if not isinstance(raw, Tensor) or not _is_state(excitation):
            raise InputError(
                f"the excitation of {key!r} in the optimizer's state cannot be read",
                "The file is damaged; give the checkpoint that training saved.",
            )
        layer, _, parameter = str(key).rpartition(".")
        weights[str(key)] = ExcitedEntry(layer, parameter, raw, dict(excitation))
    plan = Plan.from_dict(json.loads(found["plan"]), "the plan in the optimizer's state")
    return AttachedRun(weights, plan, int(found["steps"]))


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items()
    )


def _search(value: Any, depth: int) -> Mapping[str, Any] | None:
    if depth > _DEEPEST:
        return None
    inner: Any = ()
    if isinstance(value, Mapping):
        if value.keys() >= _KEYS and isinstance(value["weights"], Mapping):
            return value
        # Named entries alone: an optimizer numbers the states of its parameters.
        inner = [entry for key, entry in value.items() if isinstance(key, str)]
    elif isinstance(value, list | tuple) and len(value) <= _MOST_ENTRIES:
        inner = value
    for entry in inner:
        if isinstance(entry, Mapping | list | tuple):
            found = _search(entry, depth + 1)
            if found is not None:
                return found
    return None
