"""The record: the stages and options of an excitation, as text in a state dict.

A state dict has one record per excitation, beside its tensors: ``layer1.0.conv1.excitation.
_extra_state``, torch's key for the state of a module that is not a tensor. It is JSON::

    {"schema": 2,
     "stages": [{"standardize": {"epsilon": 1e-05}}, {"lwe": {"attention": "se", ...}}],
     "transposed_groups": null,
     "paused": false}

The stages are in the order in which they run, each with all of its options. ``paused`` is false
or how the pause will end, ``"preserve"`` or ``"paper"``. The text is stored as a uint8 tensor of
its UTF-8 bytes, which safetensors, ``weights_only=True`` and torch.distributed.checkpoint accept.
Each state dict gets a new one, so averaging, casting or broadcasting parameters and buffers cannot
change it; if a whole state dict is cast, each byte stays a whole number.

Records of schema 1 have fewer options; the missing ones take their defaults. Their ``paused`` is
true or false.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from we_surgery.errors import InputError

RECORD_KEY = "_extra_state"
SCHEMA_VERSION = 2
OLD_SCHEMA = 1
_LONGEST = 2**16  # bytes; a record of ours has a few hundred

Record = dict[str, Any]
PausedInit = Literal["preserve", "paper"]
Paused = Literal[False] | PausedInit


def is_record(key: str) -> bool:
    """Whether a state dict's key belongs to a record or to another module's extra state."""
    return key.rpartition(".")[2] == RECORD_KEY


def make_record(
    stages: Sequence[Mapping[str, Mapping[str, Any]]],
    *,
    transposed_groups: int | None = None,
    paused: Paused = False,
    schema: int = SCHEMA_VERSION,
) -> Record:
    """A record, by default of the current schema."""
    return {
        "schema": schema,
        "stages": [{name: dict(options) for name, options in stage.items()} for stage in stages],
        "transposed_groups": transposed_groups,
        "paused": paused,
    }


def stage_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of its stages."""
    return tuple(name for stage in record["stages"] for name in stage)


def outline(record: Mapping[str, Any]) -> str:
    """What two excitations must have in common: ``standardize+lwe``, and a transposed layout."""
    groups = record["transposed_groups"]
    transposed = "" if groups is None else f" of a transposed conv of {groups} groups"
    return "+".join(stage_names(record)) + transposed


def to_tensor(record: Mapping[str, Any]) -> Tensor:
    """The record as a state dict stores it; an InputError if an option is not of a JSON type."""
    try:
        text = json.dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the options of {'+'.join(stage_names(record))} cannot be saved: {error}",
            "Options must be numbers, strings, true, false, null, or lists and mappings of these.",
        ) from error
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_record(tensor: Any) -> Record:
    """The inverse of :func:`to_tensor`, for any dtype; an InputError if it is not a record."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 1 or tensor.numel() > _LONGEST:
        raise _unreadable("it is not a row of bytes")
    if tensor.is_meta:
        raise _unreadable("its tensor has no values")
    try:
        values = tensor.detach().cpu().double().round()
        record = json.loads(bytes(int(value) for value in values.tolist()).decode())
    except (ValueError, OverflowError, RecursionError) as error:
        raise _unreadable(str(error)) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise InputError(
            f"the record of an excitation has schema {schema}, and this version reads "
            f"{SCHEMA_VERSION}",
            "Install the version of we_surgery that wrote the checkpoint.",
        )
    if not _is_well_formed(record):
        raise _unreadable(f"unexpected content: {str(record)[:200]}")
    if record["paused"] is True:
        record["paused"] = "preserve"
    return record  # type: ignore[no-any-return]


def _is_well_formed(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != make_record([]).keys():
        return False
    stages, groups, paused = record["stages"], record["transposed_groups"], record["paused"]
    return (
        record["schema"] in (OLD_SCHEMA, SCHEMA_VERSION)
        and isinstance(stages, list)
        and all(isinstance(stage, dict) and len(stage) == 1 for stage in stages)
        and all(isinstance(options, dict) for stage in stages for options in stage.values())
        and (groups is None or (type(groups) is int and groups > 0))
        and (type(paused) is bool or paused in ("preserve", "paper"))
    )


def _unreadable(why: str) -> InputError:
    return InputError(
        f"the record of an excitation cannot be read: {why}",
        "Its bytes were changed. Give the checkpoint that training saved; if a script averages or "
        "casts checkpoints, let it do so to floating-point tensors alone.",
    )
