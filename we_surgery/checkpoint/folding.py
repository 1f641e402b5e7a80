"""Stripping state dicts: excited weights are folded by what the keys and records alone say."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from we_surgery.checkpoint.metadata import Metadata
from we_surgery.checkpoint.shards import open_files, resolve
from we_surgery.checkpoint.shards.files import Load, StateDict, TensorFiles
from we_surgery.checkpoint.shards.indexed import INDEX_ENDING, SafetensorsFile
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter
from we_surgery.checkpoint.staging import staged
from we_surgery.checkpoint.unwrap import VERSIONS, Weights, unwrap, with_versions
from we_surgery.checkpoint.writing import header_texts
from we_surgery.errors import (
    InputError,
    NothingToStripWarning,
    OldFormatWarning,
    SurgeryError,
    quoted,
)
from we_surgery.excitations.legacy import LEGACY_NOTE
from we_surgery.excitations.names import RAW_PREFIX

_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class StateDictReport:
    """What stripping a state dict did.

    Attributes:
        layers: weights that were folded; tied ones count each.
        tensors: entries that are left.
        values: their numbers in all, parameters and buffers.
        removed_values: numbers that are gone with the excitations.
        notes: what was chosen and dropped on the way to the state dict, as sentences.
    """

    layers: int
    tensors: int
    values: int
    removed_values: int
    notes: list[str]


def strip_state_dict(
    checkpoint: Mapping[str, Any], *, key: str | None = None, weights: Weights | None = None
) -> dict[str, Tensor]:
    """The vanilla state dict of a converted model's checkpoint. Needs no model and no plan.

    Each excited weight is folded into the entry that the vanilla layer has, at its place; the other
    entries are those of ``checkpoint``, sharing memory with it. The keys and their order are the
    vanilla model's. Bit-equal to ``strip(model).state_dict()`` of the model it was taken from.

    Args:
        checkpoint: a state dict, or what a trainer saved around one; it is not changed.
        key: where in the checkpoint the state dict is; by default the first of ``state_dict``,
            ``model``, ``state_dict_ema``, ``model_ema`` and ``ema``.
        weights: in place of ``key``, ``raw`` for the trained weights or ``ema`` for their
            average, wherever the trainer put them.

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
    if any(LEGACY_NOTE in note for note in report.notes):
        warnings.warn(f"the state dict {LEGACY_NOTE}.", OldFormatWarning, stacklevel=2)
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
    """:func:`strip_state_dict`, and what it did; without the warnings.

    With a ``dtype`` for all floating-point entries, a half-precision weight is excited in float32
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
    return stripped, _report(entries, notes)


def strip_sharded(
    source: str | Path,
    target: str | Path,
    *,
    key: str | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> StateDictReport:
    """Strips a state dict that lies in several files, and never holds more than a shard of it.

    It needs no model, no process group and no code of the files. Each tensor is written as
    safetensors as soon as it is folded; a shard's are then read back, and compared bit for bit with
    a second fold. A weight that is large is folded in its own memory, where its excitation is
    made of standardization, LWE, Rescale and MWE.

    Args:
        source: a folder of ``torch.distributed.checkpoint``, an index of shards
            (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), or the folder
            of one.
        target: a name that ends in ``.safetensors`` gives one file; any other a folder of
            shards with their index, as many as ``source`` has.
        key: where in a wrapped checkpoint the state dict is, such as ``model``.
        weights: ``"raw"`` or ``"ema"``, wherever the trainer put them, instead of ``key``.
        dtype: of all floating-point tensors; by default each keeps its own.
        force: overwrite what is there.
        progress: called with (steps done, steps in all), two for each tensor.

    Raises:
        InputError: a file is missing, damaged or refused; or the target exists without
            ``force``.
        SurgeryError: there is nothing to strip, a folded weight is not finite, or what was
            written is not what was folded. Nothing is left at the target then.
    """
    files = open_files(resolve(Path(source)))
    if not isinstance(files, TensorFiles) or isinstance(files, SafetensorsFile):
        raise InputError(
            f"{source} is a single file", "Strip it with `strip_state_dict`, or we-strip."
        )
    state = files.state_dict(key, weights)
    refuse_vanilla(state, str(files.path))
    target = Path(target)
    folder = target.suffix != _SAFETENSORS
    with staged(target, force=force, folder=folder) as temporary:
        return save_stripped(state, temporary, folder=folder, dtype=dtype, progress=progress)


def save_stripped(
    state: StateDict,
    temporary: Path,
    *,
    folder: bool,
    dtype: torch.dtype | None = None,
    metadata: Metadata | None = None,
    progress: Progress | None = None,
) -> StateDictReport:
    """Strips to safetensors tensor by tensor, under a name of :func:`staged`."""
    entries = vanilla_entries(state.tensors)
    report = _report(entries, state.notes)
    forms = {name: _form(entry, dtype) for name, entry in entries.items()}
    done = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(done), 2 * len(entries))

    header = header_texts(metadata)
    groups = _by_shard(state, entries)
    if not folder:
        with SafetensorsWriter(temporary, forms, header) as writer:
            for shard, names in groups:
                _write(writer, state, shard, {n: entries[n] for n in names}, dtype, step)
        return report
    stem = "model" if state.files is None else _stem(state.files.path)
    places: dict[str, str] = {}
    for number, (shard, names) in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}{_SAFETENSORS}"
        with SafetensorsWriter(temporary / file, {n: forms[n] for n in names}, header) as writer:
            _write(writer, state, shard, {n: entries[n] for n in names}, dtype, step)
        places |= dict.fromkeys(names, file)
    size = sum(form.nbytes for form in forms.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (temporary / f"{stem}{_SAFETENSORS}{INDEX_ENDING}").write_text(json.dumps(index, indent=2))
    return report


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


def _write(
    writer: SafetensorsWriter,
    state: StateDict,
    shard: int,
    entries: Mapping[str, Tensor | ExcitedEntry],
    dtype: torch.dtype | None,
    step: Callable[[], None],
) -> None:
    """Writes a shard's entries, then reads and computes all anew: no bit may differ."""

    def check(name: str, tensor: Tensor) -> None:
        if not writer.holds(name, tensor):
            raise SurgeryError(
                f"{name!r} was written and is not bit-equal to what it is folded to",
                "The disk or the memory is faulty, or an excitation is not deterministic; "
                "nothing was left at the target.",
            )

    for act in (writer.write, check):
        with _open(state, shard, entries.values()) as load:
            for name, entry in entries.items():
                act(name, _computed(name, entry, load, dtype, in_place=state.files is not None))
                step()


def _form(entry: Tensor | ExcitedEntry, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the meta device in the shape and dtype that is written."""
    tensor = entry.raw if isinstance(entry, ExcitedEntry) else entry
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    return cast("", tensor.to("meta") if is_plain else tensor, dtype)


def _by_shard(
    state: StateDict, entries: Mapping[str, Tensor | ExcitedEntry]
) -> list[tuple[int, list[str]]]:
    """The vanilla names by the shard that holds them, or the raw weight they are folded from."""
    shard_of = state.shard_of()
    groups: dict[int, list[str]] = {}
    for name, entry in entries.items():
        home = shard_of[entry.raw_key if isinstance(entry, ExcitedEntry) else name]
        groups.setdefault(home, []).append(name)
    return sorted(groups.items())


@contextmanager
def _open(state: StateDict, shard: int, entries: Iterable[Tensor | ExcitedEntry]) -> Iterator[Load]:
    """Reads a shard's tensors, and those of its layers' excitations that lie in others."""
    shard_of = state.shard_of()
    elsewhere: dict[int, list[str]] = {}
    excited = [entry for entry in entries if isinstance(entry, ExcitedEntry)]
    for name in [entry.excitation_prefix + key for entry in excited for key in entry.excitation]:
        if name in shard_of and shard_of[name] != shard:
            elsewhere.setdefault(shard_of[name], []).append(name)
    # Excitations are small: they are copied, and their files closed before this one is opened.
    held: dict[str, Tensor] = {}
    for other, names in elsewhere.items():
        with state.open(other) as load_other:
            held |= {name: load_other(name).clone() for name in names}
    with state.open(shard) as load:
        yield lambda name: held[name] if name in held else load(name)


def _computed(
    name: str,
    entry: Tensor | ExcitedEntry,
    load: Load,
    dtype: torch.dtype | None,
    *,
    in_place: bool,
) -> Tensor:
    """The value of a vanilla entry, folded where it is excited."""
    if isinstance(entry, ExcitedEntry):
        # What is not of the meta device is not in a file.
        read = entry.replaced(lambda key, own: load(key) if own.is_meta else own)
        return read.fold(dtype, in_place=in_place)
    return cast(name, load(name), dtype)


def _stem(path: Path) -> str:
    """``model`` of ``model.safetensors.index.json``, as the shards' names begin."""
    ending = f"{_SAFETENSORS}{INDEX_ENDING}"
    return path.name.removesuffix(ending) if path.name.endswith(ending) else "model"


def _report(entries: Mapping[str, Tensor | ExcitedEntry], notes: list[str]) -> StateDictReport:
    """What folding all of :func:`vanilla_entries` does."""
    excited = [entry for entry in entries.values() if isinstance(entry, ExcitedEntry)]
    plain = [entry for entry in entries.values() if isinstance(entry, Tensor)]
    is_legacy = any(entry.is_legacy for entry in excited)
    return StateDictReport(
        layers=len(excited),
        tensors=len(entries),
        values=sum(tensor.numel() for tensor in [*plain, *(entry.raw for entry in excited)]),
        removed_values=sum(v.numel() for entry in excited for v in entry.tensors.values()),
        notes=[*notes, *([f"the state dict {LEGACY_NOTE}"] if is_legacy else [])],
    )


def vanilla_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor | ExcitedEntry]:
    """What each entry of the vanilla state dict is made of, in its order.

    The state dict is without wrappers; meta tensors will do.
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
    """Raises where one half of an excited weight is there and the other is missing."""
    left = list(plain)
    raw = [key for key in left if is_raw_weight(key) and _vanilla_key(key) not in state]
    if raw:
        raise no_record(raw)
    excitations = [key for key in left if is_of_excitation(key)]
    if excitations:
        raise InputError(
            f"{quoted(excitations)} belong to excited weights whose raw weights are missing",
            "The file is damaged or was edited; give the checkpoint that training saved.",
        )


def _vanilla_key(raw_key: str) -> str:
    owner, dot, last = raw_key.rpartition(".")
    return f"{owner}{dot}{last.removeprefix(RAW_PREFIX)}"


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
