"""What a file's tensors excite, held against the plan in the same file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from we_surgery.checkpoint.contents import Contents
from we_surgery.checkpoint.excited_entry import ExcitedEntry, find_excited
from we_surgery.checkpoint.unwrap import VERSIONS, with_versions
from we_surgery.errors import InputError, quoted
from we_surgery.excitations import Rescale, check_stage
from we_surgery.excitations.legacy import LEGACY_NOTE, read_legacy, upgraded
from we_surgery.excitations.record import RECORD_KEY, Record, outline
from we_surgery.planning.plans import Plan
from we_surgery.planning.rows import Decision

_HINT = "The file is damaged or was edited; give the checkpoint that it was made from."


def settled(contents: Contents, name: str) -> Contents:
    """The contents, their excited weights being those of the file's own plan.

    A state dict in the old form gets records where the plan agrees with its tensors.
    """
    plan = None if contents.metadata is None else contents.metadata.stored_plan
    if plan is None:
        return contents
    weights = contents.weights
    if weights is not None:
        state = weights.with_excitations()
    else:
        state = {} if contents.model is None else _tensors(contents.model.state_dict())
    entries = {(entry.layer, entry.parameter): entry for entry in find_excited(state)}
    _refuse_lost(entries, plan, name)
    old: list[ExcitedEntry] = []
    for row in plan.decisions:
        entry = entries.get((row.module, row.parameter))
        if entry is None:
            continue
        if RECORD_KEY in entry.excitation:
            record = entry.record()
        else:
            record = read_legacy(entry.excitation)[0]
            old.append(entry)
        _refuse_other(row, record, name)
    if weights is None or not old:
        return contents
    tensors = _upgraded(weights.tensors, old)
    in_files = {key for key, value in tensors.items() if value.is_meta}
    stored = {key: place for key, place in weights.stored.items() if key in in_files}
    return replace(
        contents,
        weights=replace(weights, tensors=tensors, stored=stored),
        notes=[*contents.notes, f"{name} {LEGACY_NOTE}"],
    )


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _refuse_lost(entries: Iterable[tuple[str, str]], plan: Plan, name: str) -> None:
    found = set(entries)
    lost = [row.layer for row in plan.excited if (row.module, row.parameter) not in found]
    if lost:
        raise InputError(
            f"{name} was converted by a plan that excites {quoted(lost)}, but holds no excited "
            "weight of these",
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
    """Whether an option differs that both have, and that no checkpoint may change."""
    excitation = check_stage(stage)
    for option, value in {**excitation.options(), **planned}.items():
        own = said.get(option)
        if option in excitation.adjustable or option not in said:
            continue
        if isinstance(value, Mapping | str) and isinstance(own, Mapping | str):
            # A stacked excitation in the old form says in full what the plan says in short.
            if type(value) is type(own) and value != own:
                return True
        elif value is not None and own is not None and value != own:
            return True
    return False


def _upgraded(state: Mapping[str, Tensor], old: Iterable[ExcitedEntry]) -> dict[str, Tensor]:
    by_raw_key = {entry.raw_key: entry for entry in old}
    gone = {e.excitation_prefix + key for e in by_raw_key.values() for key in e.excitation}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in gone:
            found[key] = value
        if key in by_raw_key:
            entry = by_raw_key[key]
            own = upgraded(entry.excitation)
            found |= {entry.excitation_prefix + name: tensor for name, tensor in own.items()}
    versions = getattr(state, VERSIONS, None)
    return found if versions is None else with_versions(found, versions)
