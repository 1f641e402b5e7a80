"""A safetensors file, or shards with an index, as transformers and accelerate write them.

The index is ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.safe_pickle.recognize import FileKind, recognize
from we_surgery.checkpoint.safe_pickle.unpickle import map_tensors
from we_surgery.checkpoint.shards.files import Load, TensorFiles, check_file_name
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsReader
from we_surgery.errors import InputError, damaged, quoted

INDEX_ENDING = ".index.json"


class SafetensorsFile(TensorFiles):
    """One safetensors file."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(SafetensorsReader(path)) as reader:
            header, self.tensors = reader.metadata, reader.tensors
        if not self.tensors:
            raise damaged(f"{path} holds no tensors")
        # `safetensors.torch.save_model` writes a shared tensor once, and in the header its names.
        self._kept = {
            name: kept
            for name, kept in header.items()
            if kept in self.tensors and name not in self.tensors
        }
        self.tensors |= {n: torch.empty_like(self.tensors[k]) for n, k in self._kept.items()}
        self.shards = [list(self.tensors)]
        if METADATA_KEY in header:
            self.metadata = Metadata.from_json(header[METADATA_KEY], str(path))

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        with closing(SafetensorsReader(self.path)) as reader:
            yield lambda name: reader.read(self._kept.get(name, name))


class IndexedShards(TensorFiles):
    """Files of safetensors or torch.save, and an index that says which tensor is in which."""

    kind = "sharded"

    def __init__(self, path: Path) -> None:
        self.path = path
        names = _weight_map(path)
        files = list(dict.fromkeys(names.values()))
        self.files = [path.parent / file for file in files]
        self.shards = [[key for key in names if names[key] == file] for file in files]
        self.kinds = [_shard_kind(path, file) for file in self.files]
        self.notes = notes = []
        found: dict[str, Tensor] = {}
        for file, kind, keys in zip(self.files, self.kinds, self.shards, strict=True):
            with _open_file(file, kind) as (tensors, _):
                missing = [key for key in keys if key not in tensors]
                if missing:
                    raise damaged(
                        f"{path} says that {file.name} holds {quoted(missing)}, but it does not"
                    )
                found |= {key: _described(tensors[key]) for key in keys}
                unlisted = sorted(tensors.keys() - names.keys())
                if unlisted:
                    notes.append(
                        f"left out {quoted(unlisted)} of {file.name}, which {path.name} does not "
                        "list"
                    )
        self.tensors = {key: found[key] for key in names}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        with _open_file(self.files[shard], self.kinds[shard]) as (_, load):
            yield load


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", "Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path} is not an index of shards: {error}") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"{path} is not an index of shards: it has no 'weight_map'",
            "Give the *.index.json that lies beside the shards.",
        )
    return {key: check_file_name(path, name) for key, name in names.items()}


def _shard_kind(index: Path, file: Path) -> FileKind:
    if not file.exists():
        raise damaged(f"{index} refers to the shard {file.name}, which is missing")
    return recognize(file)


@contextmanager
def _open_file(file: Path, kind: FileKind) -> Iterator[tuple[dict[str, Tensor], Load]]:
    """The tensors in a file, with their values or on the meta device, and what reads one."""
    if kind is FileKind.SAFETENSORS:
        with closing(SafetensorsReader(file)) as reader:
            yield reader.tensors, reader.read
        return
    mapped = map_tensors(file, kind)
    places = Counter(map(_storage, mapped.values()))

    def load(key: str) -> Tensor:
        # Tied tensors are one memory, which may be overwritten for the first of them.
        return mapped[key].clone() if places[_storage(mapped[key])] > 1 else mapped[key]

    yield mapped, load


def _described(tensor: Tensor) -> Tensor:
    """A meta tensor like it, and never itself: each goes by its id later."""
    if tensor.is_quantized:  # torch has no such tensor without memory
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


def _storage(tensor: Tensor) -> int:
    """Equal for tensors in one memory; a sparse tensor's is its own."""
    is_plain = tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if is_plain else id(tensor)
