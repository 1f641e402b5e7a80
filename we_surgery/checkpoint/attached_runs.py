"""Checkpoints of attached runs: vanilla weights, and the excitation in the optimizer's state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from we_surgery.attached.riding import parts_in
from we_surgery.attached.state import joined
from we_surgery.checkpoint.excited_entry import ExcitedEntry
from we_surgery.errors import InputError
from we_surgery.planning.plans import Plan

RUN_OBJECTS = ("version", "plan", "steps")
"""The entries of a run's state that are not tensors."""

_KEYS = frozenset({*RUN_OBJECTS, "weights"})
_DEEPEST = 5
_MOST_ENTRIES = 100
"""Of a list: trainers keep a few optimizers in one, and other lists may be long."""


@dataclass(frozen=True)
class AttachedRun:
    """The state of an attached excitation: an entry for each weight by its key, plan and steps."""

    weights: Mapping[str, ExcitedEntry]
    plan: Plan
    steps: int

    @property
    def note(self) -> str:
        """A note for the user."""
        return (
            f"excitation attached to the optimizer, after {self.steps} steps; the model's weights "
            "are the excited ones, ready to deploy"
        )

    def misfit(self, state: Mapping[str, Tensor]) -> str | None:
        """The first weight that the model does not have in this shape."""
        for key, entry in self.weights.items():
            if key not in state or state[key].shape != entry.raw.shape:
                return key
        return None

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the converted form, in the order of the model's own ``state``."""
        entries = dict(self.weights)
        rows = self.plan.excited
        keys = {row.layer: f"{row.module}.{row.parameter}".removeprefix(".") for row in rows}
        for row in rows:
            # The run has one entry for tied weights.
            first = entries.get(keys.get(row.shared_with or "", ""))
            if first is not None:
                entries.setdefault(keys[row.layer], first)
        converted: dict[str, Tensor] = {}
        for key, value in state.items():
            first = entries.get(key)
            if first is None:
                converted[key] = value
                continue
            layer, _, parameter = key.rpartition(".")
            own = ExcitedEntry(layer, parameter, first.raw, first.excitation)
            converted[own.raw_key] = own.raw
            converted |= {own.excitation_prefix + k: v for k, v in own.excitation.items()}
        return converted


def find_attached_run(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]
) -> AttachedRun | None:
    """The state of the excitation of a model, wherever a trainer put it; None if there is none.

    Each of several optimizers holds a part of it. ``state`` is the state dict of the model.
    """
    runs = [_read(found) for found in _search(checkpoint, 0)]
    fitting = [run for run in runs if run.misfit(state) is None]
    if not fitting:
        if not runs:
            return None
        raise InputError(
            f"the optimizer's state excites {runs[0].misfit(state)!r}, and the model in the "
            "checkpoint has no weight of this name and shape",
            "Give the checkpoint as training saved it.",
        )
    weights = {key: entry for run in fitting for key, entry in run.weights.items()}
    return AttachedRun(weights, fitting[0].plan, max(run.steps for run in fitting))


def _read(found: Mapping[str, Any]) -> AttachedRun:
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


def _is_part(value: Any) -> bool:
    # DCP writes no empty mappings, as of a weight without trained parameters.
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key, {}), Mapping) for key in ("weights", "optimizer")
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items()
    )


def _search(value: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    inner: Any = ()
    if isinstance(value, Mapping):
        if value.keys() >= _KEYS and isinstance(value["weights"], Mapping):
            yield value
            return
        if isinstance(value.get("state"), Mapping) and "param_groups" in value:
            parts = [part for part in parts_in(value["state"]) if _is_part(part)]
            whole = joined(parts)
            if whole.keys() >= _KEYS:
                yield whole
            return
        inner = [entry for key, entry in value.items() if isinstance(key, str)]
    elif isinstance(value, list | tuple) and len(value) <= _MOST_ENTRIES:
        inner = value
    for entry in inner if depth < _DEEPEST else ():
        yield from _search(entry, depth + 1)
