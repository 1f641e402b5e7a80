"""Shards with an index of the tensors in each, as transformers and accelerate write them.

The index is ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from we_surgery.checkpoint.recognize import FileKind, recognize
from we_surgery.checkpoint.sharded import SAVE_AGAIN, Load, ShardedFiles, check_file_name
from we_surgery.checkpoint.streaming import SafetensorsReader
from we_surgery.checkpoint.unpickle import map_tensors
from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError

INDEX_ENDING = ".index.json"


class IndexedShards(ShardedFiles):
    """Files of safetensors or torch.save, and an index that says which tensor is in which."""

    kind = "sharded"

    def __init__(self, path: Path) -> None:
        self.path = path
        names = _weight_map(path)
        files = list(dict.fromkeys(names.values()))
        self.files = [path.parent / file for file in files]
        self.shards = [[key for key in names if names[key] == file] for file in files]
        self.kinds = [_shard_kind(path, file) for file in self.files]
        self.tensors = {}
        self.notes = []
        found: dict[str, Tensor] = {}
        for file, kind, keys in zip(self.files, self.kinds, self.shards, strict=True):
            with _open_file(file, kind) as (known, _, describe):
                missing = [key for key in keys if key not in known]
                if missing:
                    raise InputError(
                        f"{path} says that {file.name} holds {quoted(missing)}, and it does not",
                        SAVE_AGAIN,
                    )
                found |= {key: describe(key) for key in keys}
                unlisted = sorted(known - names.keys())
                if unlisted:
                    self.notes.append(
                        f"left out {quoted(unlisted)} of {file.name}, which {path.name} does not "
                        "list"
                    )
        self.tensors = {key: found[key] for key in names}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        with _open_file(self.files[shard], self.kinds[shard]) as (_, load, _):
            yield load


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", "Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no index of shards: {error}", SAVE_AGAIN) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"{path} is no index of shards: it has no 'weight_map'",
            "Give the *.index.json that lies beside the shards.",
        )
    return {key: check_file_name(path, name) for key, name in names.items()}


def _shard_kind(index: Path, file: Path) -> FileKind:
    if not file.exists():
        raise InputError(f"{index} names the shard {file.name}, which is missing", SAVE_AGAIN)
    return recognize(file)


@contextmanager
def _open_file(file: Path, kind: FileKind) -> Iterator[tuple[set[str], Load, Load]]:
    """The names in a file, what reads one, and what describes one on the meta device."""
    if kind is not FileKind.SAFETENSORS:
        mapped = map_tensors(file, kind)
        places = Counter(map(_storage, mapped.values()))

        def load_mapped(key: str) -> Tensor:
            # Tied tensors are one memory, which may be overwritten for the first of them.
            return mapped[key].clone() if places[_storage(mapped[key])] > 1 else mapped[key]

        def describe_mapped(key: str) -> Tensor:
            tensor = mapped[key]
            if tensor.is_quantized:  # torch has no such tensor without memory
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            # A copy, also of one that is without values in the file: each goes by its id later.
            return torch.empty_like(tensor, device="meta")

        yield set(mapped), load_mapped, describe_mapped
        return
    from safetensors import safe_open

    def load(key: str) -> Tensor:
        with _readable(file):
            return reader.read(key, describe(key))

    def describe(key: str) -> Tensor:
        with _readable(file):
            # An empty slice has the dtype and reads nothing.
            piece = opened.get_slice(key)
            shape = piece.get_shape()
            dtype = (piece[0:0] if shape else opened.get_tensor(key)).dtype
            return torch.empty(shape, dtype=dtype, device="meta")

    with _readable(file):
        opened: Any = safe_open(file, framework="pt", device="cpu")
        reader = SafetensorsReader(file)
    with opened, closing(reader):
        yield set(opened.keys()), load, describe


def _storage(tensor: Tensor) -> int:
    """Equal for tensors in one memory; a sparse tensor's is its own."""
    is_plain = tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if is_plain else id(tensor)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is a damaged or cut short safetensors file: {error}", SAVE_AGAIN
        ) from error
