"""Stripping a state dict in several files, tensor by tensor: no model, no process group."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from we_surgery.checkpoint.excited_entry import ExcitedEntry, cast
from we_surgery.checkpoint.folding import Progress, StateDictReport, report, vanilla_entries
from we_surgery.checkpoint.indexed_shards import INDEX_ENDING
from we_surgery.checkpoint.locating import open_sharded
from we_surgery.checkpoint.sharded import Load, ShardedStateDict
from we_surgery.checkpoint.staging import staged
from we_surgery.checkpoint.streaming import SafetensorsWriter
from we_surgery.checkpoint.unwrap import Weights
from we_surgery.errors import InputError, SurgeryError

_SAFETENSORS = ".safetensors"


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
        InputError: a file is missing, damaged or names what it may not name; or the target
            exists without ``force``.
        SurgeryError: there is nothing to strip, a folded weight is not finite, or what was
            written is not what was folded. Nothing is left at the target then.
    """
    files = open_sharded(source)
    if files is None:
        raise InputError(
            f"{source} is a single file", "Strip it with `strip_state_dict`, or we-strip."
        )
    state = files.state_dict(key, weights)
    target = Path(target)
    folder = target.suffix != _SAFETENSORS
    with staged(target, force=force, folder=folder) as temporary:
        return save_stripped(state, temporary, folder=folder, dtype=dtype, progress=progress)


def save_stripped(
    state: ShardedStateDict,
    temporary: Path,
    *,
    folder: bool,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> StateDictReport:
    """:func:`strip_sharded` to a name of :func:`~we_surgery.checkpoint.staging.staged`.

    Args:
        state: the state dict; its order is kept within each shard.
        temporary: the file, or the folder, to write.
        folder: which of the two.
        dtype: as there.
        progress: as there.
    """
    entries = vanilla_entries(state.tensors)
    if not any(isinstance(entry, ExcitedEntry) for entry in entries.values()):
        raise SurgeryError(
            f"{state.files.path} holds no excited weights, so there is nothing to strip",
            "Give the checkpoint of a converted model; `we-inspect` tells what it is.",
        )
    forms = {name: _form(entry, dtype) for name, entry in entries.items()}
    groups = _by_shard(state, entries)
    done = itertools.count(1)

    def write(writer: SafetensorsWriter, shard: int, names: list[str]) -> None:
        def check(name: str, tensor: Tensor) -> None:
            if not writer.holds(name, tensor):
                raise SurgeryError(
                    f"{name!r} was written and is not bit-equal to what it is folded to",
                    "The disk or the memory is faulty; nothing was left at the target.",
                )

        # Then read and computed anew: neither that nor the disk may differ by a bit.
        for act in (writer.write, check):
            with _open(state, shard, [entries[name] for name in names]) as load:
                for name in names:
                    act(name, _computed(name, entries[name], load, dtype))
                    if progress is not None:
                        progress(next(done), 2 * len(entries))

    if folder:
        stem = _stem(state.files.path)
        places: dict[str, str] = {}
        for number, (shard, names) in enumerate(groups, 1):
            file = f"{stem}-{number:05}-of-{len(groups):05}{_SAFETENSORS}"
            with SafetensorsWriter(temporary / file, {n: forms[n] for n in names}) as writer:
                write(writer, shard, names)
            places |= dict.fromkeys(names, file)
        size = sum(form.nbytes for form in forms.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (temporary / f"{stem}{_SAFETENSORS}{INDEX_ENDING}").write_text(json.dumps(index, indent=2))
    else:
        with SafetensorsWriter(temporary, forms) as writer:
            for shard, names in groups:
                write(writer, shard, names)
    return report(entries, state.notes)


def _form(entry: Tensor | ExcitedEntry, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the meta device in the shape and dtype that is written."""
    tensor = entry.raw if isinstance(entry, ExcitedEntry) else entry
    return cast("", tensor, dtype).to("meta")


def _by_shard(
    state: ShardedStateDict, entries: Mapping[str, Tensor | ExcitedEntry]
) -> list[tuple[int, list[str]]]:
    """The vanilla names by the shard that holds them, or the raw weight they are folded from."""
    shard_of = state.shard_of()
    groups: dict[int, list[str]] = {}
    for name, entry in entries.items():
        home = shard_of[entry.raw_key if isinstance(entry, ExcitedEntry) else name]
        groups.setdefault(home, []).append(name)
    return sorted(groups.items())


@contextmanager
def _open(
    state: ShardedStateDict, shard: int, entries: list[Tensor | ExcitedEntry]
) -> Iterator[Load]:
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
    name: str, entry: Tensor | ExcitedEntry, load: Load, dtype: torch.dtype | None
) -> Tensor:
    """The value of a vanilla entry, folded where it is excited."""
    if isinstance(entry, ExcitedEntry):
        # What is not of the meta device is in no file.
        return entry.replaced(lambda key, own: load(key) if own.is_meta else own).fold(
            dtype, in_place=True
        )
    return cast(name, load(name), dtype)


def _stem(path: Path) -> str:
    """``model`` of ``model.safetensors.index.json``, as the shards' names begin."""
    ending = f"{_SAFETENSORS}{INDEX_ENDING}"
    return path.name.removesuffix(ending) if path.name.endswith(ending) else "model"
