"""Strips state dicts: folds excited weights by their keys and records alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from we_surgery._util.progress import Progress
from we_surgery.checkpoint.excited_entry import (
    ExcitedEntry,
    cast,
    excitation_of,
    find_excited,
    is_of_excitation,
    is_raw_weight,
    no_record,
    tensor_identity,
)
from we_surgery.checkpoint.shards.files import StateDict
from we_surgery.checkpoint.unwrap import VERSIONS, Weights, unwrap, with_versions
from we_surgery.errors import (
    InputError,
    NothingToStripWarning,
    SurgeryError,
    quoted,
)
from we_surgery.excitations.names import vanilla_key


@dataclass(frozen=True)
class StateDictReport:
    """The result of stripping a state dict.

    Attributes:
        layers: number of folded weights; tied ones count each.
        tensors: number of remaining entries.
        values: number of their values, parameters and buffers.
        removed_values: number of the excitations' values.
        notes: what was chosen and dropped, as sentences.
    """

    layers: int
    tensors: int
    values: int
    removed_values: int
    notes: list[str]


def strip_state_dict(
    checkpoint: Mapping[str, Any], *, key: str | None = None, weights: Weights | None = None
) -> dict[str, Tensor]:
    """Returns the vanilla state dict of a converted model's checkpoint. Needs no model or plan.

    Each excited weight becomes an entry under its vanilla key; the other entries share memory with
    ``checkpoint``. The keys and their order are the vanilla model's. The result is bit-equal to
    ``strip(model).state_dict()``.

    Args:
        checkpoint: a state dict, or a trainer's checkpoint that contains one; not changed.
        key: where in the checkpoint the state dict is; by default the first of ``state_dict``,
            ``model``, ``state_dict_ema``, ``model_ema`` and ``ema``.
        weights: instead of ``key``: ``raw`` for the trained weights or ``ema`` for their average,
            under any trainer's key.

    Returns:
        The state dict without wrappers and without the prefixes of DDP and ``torch.compile``.
        One without excitations is returned with a :class:`NothingToStripWarning`.

    Raises:
        InputError: there is no state dict, or an excitation in it is not known or not complete;
            or both ``key`` and ``weights`` are given.
        SurgeryError: a folded weight is not finite.

    Example:
        >>> checkpoint = torch.load("last.pth.tar")
        >>> averaged = ws.strip_state_dict(checkpoint, weights="ema")
    """
    stripped, report = strip_state_dict_with_report(checkpoint, key=key, weights=weights)
    if not report.layers:
        warnings.warn(
            "the state dict has no excited weights; there is nothing to strip.",
            NothingToStripWarning,
            stacklevel=2,
        )
    return stripped


def strip_state_dict_with_report(
    checkpoint: Mapping[str, Any],
    *,
    key: str | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], StateDictReport]:
    """:func:`strip_state_dict` with a report, without warnings.

    With a ``dtype`` for all floating-point entries, half-precision weights are excited in float32
    and rounded once. ``progress`` is called with (weights done, weights in all).
    """
    state, notes = unwrap(checkpoint, key, weights)
    _refuse_sharded(state)
    entries = vanilla_entries(state)
    excited = [entry for entry in entries.values() if isinstance(entry, ExcitedEntry)]
    stripped: dict[str, Tensor] = {}
    folded: dict[tuple[Any, ...], Tensor] = {}
    done = itertools.count(1)
    for name, entry in entries.items():
        if isinstance(entry, Tensor):
            stripped[name] = cast(name, entry, dtype)
            continue
        identity = entry.identity()
        if identity not in folded:
            folded[identity] = entry.fold(dtype)
        stripped[name] = folded[identity]
        if progress is not None:
            progress(next(done), len(excited))
    versions = getattr(state, VERSIONS, None)
    if versions is not None:
        prefixes = {entry.excitation_prefix for entry in excited}
        left = {k: v for k, v in versions.items() if excitation_of(f"{k}.", prefixes) is None}
        stripped = with_versions(stripped, left)
    return stripped, report_of(entries, notes)


def refuse_vanilla(state: StateDict, name: str) -> None:
    """Raises if a state dict holds no excited weights, or one that cannot be folded."""
    entries = vanilla_entries(state.tensors)
    if not any(isinstance(entry, ExcitedEntry) for entry in entries.values()):
        raise nothing_to_strip(name)


def nothing_to_strip(name: str) -> SurgeryError:
    """The error for a file without excited weights."""
    return SurgeryError(
        f"{name} holds no excited weights, so there is nothing to strip",
        "Give the checkpoint of a converted model; `we-inspect FILE` tells what a file is.",
    )


def report_of(entries: Mapping[str, Tensor | ExcitedEntry], notes: list[str]) -> StateDictReport:
    """The report on folding all of :func:`vanilla_entries`."""
    excited = [entry for entry in entries.values() if isinstance(entry, ExcitedEntry)]
    plain = [entry for entry in entries.values() if isinstance(entry, Tensor)]
    return StateDictReport(
        layers=len(excited),
        tensors=len(entries),
        values=sum(tensor.numel() for tensor in [*plain, *(entry.raw for entry in excited)]),
        removed_values=sum(v.numel() for entry in excited for v in entry.tensors.values()),
        notes=notes,
    )


def vanilla_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor | ExcitedEntry]:
    """The sources of each entry of the vanilla state dict, in its order.

    The state dict has no wrappers, and may be on the meta device.
    """
    by_raw_key = {entry.raw_key: entry for entry in find_excited(state)}
    excited = by_raw_key.values()
    removed = {entry.excitation_prefix + key for entry in excited for key in entry.excitation}
    _refuse_tied_after_conversion(state, by_raw_key)
    _refuse_halves([key for key in state if key not in by_raw_key and key not in removed], state)
    return {
        (by_raw_key[name].vanilla_key if name in by_raw_key else name): by_raw_key.get(name, value)
        for name, value in state.items()
        if name not in removed
    }


def _refuse_halves(plain: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """Raises if a raw weight has no excitation, or an excitation no raw weight."""
    left = list(plain)
    raw = [key for key in left if is_raw_weight(key) and vanilla_key(key) not in state]
    if raw:
        raise no_record(raw)
    excitations = [key for key in left if is_of_excitation(key)]
    if excitations:
        raise InputError(
            f"{quoted(excitations)} belong to excited weights whose raw weights are missing",
            "The file is damaged or was edited; give the checkpoint that training saved.",
        )


def _refuse_sharded(state: Mapping[str, Tensor]) -> None:
    sharded = next((name for name, value in state.items() if hasattr(value, "full_tensor")), None)
    if sharded is not None:
        raise InputError(
            f"the state dict is sharded: {sharded!r} is a DTensor",
            "Gather the full state dict first: `torch.distributed.checkpoint.state_dict."
            "get_model_state_dict` with `full_state_dict=True`.",
        )


def _refuse_tied_after_conversion(
    state: Mapping[str, Tensor], by_raw_key: Mapping[str, ExcitedEntry]
) -> None:
    raw = {tensor_identity(entry.raw): entry.display_name for entry in by_raw_key.values()}
    for name, value in state.items():
        if name not in by_raw_key and raw and tensor_identity(value) in raw:
            raise SurgeryError(
                f"{name!r} was tied to the raw weight of {raw[tensor_identity(value)]!r} after "
                "its conversion",
                "Tie layers before converting, so that the plan can decide for all of them.",
            )
