"""Checks a file's tensors against the plan in the same file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from we_surgery.checkpoint.contents import Contents
from we_surgery.checkpoint.excited_entry import find_excited
from we_surgery.errors import InputError, quoted
from we_surgery.excitations import Rescale, check_stage
from we_surgery.excitations.record import Record, outline
from we_surgery.planning.plans import Plan
from we_surgery.planning.rows import Decision

_HINT = "The file is damaged or was edited; give the checkpoint that it was made from."


def check_plan(contents: Contents) -> None:
    """Raises unless the excited weights of a file are those of the file's own plan."""
    plan = None if contents.metadata is None else contents.metadata.stored_plan
    if plan is None:
        return
    name = str(contents.path)
    weights = contents.weights
    if weights is not None:
        state = weights.with_excitations()
    else:
        state = {} if contents.model is None else _tensors(contents.model.state_dict())
    entries = {(entry.layer, entry.parameter): entry for entry in find_excited(state)}
    _refuse_lost(entries, plan, name)
    for row in plan.decisions:
        entry = entries.get((row.module, row.parameter))
        if entry is not None:
            _refuse_other(row, entry.record(), name)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _refuse_lost(entries: Iterable[tuple[str, str]], plan: Plan, name: str) -> None:
    found = set(entries)
    lost = [row.layer for row in plan.excited if (row.module, row.parameter) not in found]
    if lost:
        raise InputError(
            f"the plan in {name} excites {quoted(lost)}, but the file holds no excited weights for "
            "them",
            _HINT,
        )


def _refuse_other(row: Decision, record: Record, name: str) -> None:
    said = {
        stage: options
        for each in record["stages"]
        for stage, options in each.items()
        if stage != Rescale.name  # it is added by `preserve`
    }
    planned = {stage: options for each in row.excitation for stage, options in each.items()}
    groups = row.groups if row.layout.transposed else None
    if (
        said.keys() != planned.keys()
        or record["transposed_groups"] != groups
        or any(_differ(stage, planned[stage], said[stage]) for stage in planned)
    ):
        raise InputError(
            f"{name}: the file's plan gives layer {row.layer!r} {'+'.join(planned) or 'nothing'} "
            f"with the options {planned}, but its tensors say {outline(record)} with {said}",
            _HINT,
        )


def _differ(stage: str, planned: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether an option that both have differs, and may not be changed by a checkpoint."""
    excitation = check_stage(stage)
    for option, value in {**excitation.options(), **planned}.items():
        own = said.get(option)
        if option not in excitation.adjustable and None not in (value, own) and value != own:
            return True
    return False
