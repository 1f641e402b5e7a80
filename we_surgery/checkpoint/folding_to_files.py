"""Strips to safetensors, tensor by tensor: no model, no process group."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from we_surgery._util.progress import Progress
from we_surgery.checkpoint.contents import read
from we_surgery.checkpoint.excited_entry import ExcitedEntry, cast
from we_surgery.checkpoint.folding import (
    StateDictReport,
    refuse_vanilla,
    report_of,
    vanilla_entries,
)
from we_surgery.checkpoint.metadata import Metadata
from we_surgery.checkpoint.shards.files import Load, StateDict
from we_surgery.checkpoint.shards.indexed import INDEX_ENDING
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter
from we_surgery.checkpoint.staging import staged
from we_surgery.checkpoint.unwrap import Weights
from we_surgery.checkpoint.writing import header_texts
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
    """Strips a state dict stored in several files, with at most one shard in memory.

    It needs no model and no process group, and runs no code from the files. Each tensor is folded
    and written as safetensors. Each shard is then read back and compared bit for bit with a second
    fold. Large weights with standardization, LWE and MWE are folded in place.

    Args:
        source: a folder of ``torch.distributed.checkpoint``, an index of shards
            (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), or the folder
            of one.
        target: a name that ends in ``.safetensors`` gives one file; any other a folder of
            shards with their index, as many as ``source`` has.
        key: where in a wrapped checkpoint the state dict is, such as ``model``.
        weights: ``"raw"`` or ``"ema"`` instead of ``key``, under any trainer's key.
        dtype: of all floating-point tensors; by default each keeps its own.
        force: overwrite existing files.
        progress: called with (steps done, steps in all), two for each tensor.

    Raises:
        InputError: a file is missing, damaged or refused; or the target exists without
            ``force``.
        SurgeryError: there is nothing to strip, a folded weight is not finite, or the written file
            is not bit-equal. Then nothing is written.
    """
    contents = read(source, key=key, weights=weights)
    if contents.kind not in ("sharded", "dcp"):
        raise InputError(
            f"{source} is a single file", "Strip it with `strip_state_dict`, or we-strip."
        )
    state = contents.weights
    assert state is not None
    refuse_vanilla(state, str(contents.path))
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
    report = report_of(entries, state.notes)
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


def _write(
    writer: SafetensorsWriter,
    state: StateDict,
    shard: int,
    entries: Mapping[str, Tensor | ExcitedEntry],
    dtype: torch.dtype | None,
    step: Callable[[], None],
) -> None:
    """Writes a shard's entries, reads them back and compares them with a second fold."""

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
