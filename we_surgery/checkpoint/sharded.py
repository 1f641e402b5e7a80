"""State dicts in several files, read tensor by tensor.

Two layouts: an index of shards, as transformers and accelerate write it
(``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), and a folder of
torch.distributed.checkpoint (:mod:`we_surgery.checkpoint.dcp`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from we_surgery.checkpoint.recognize import FileKind, recognize
from we_surgery.checkpoint.streaming import SafetensorsReader
from we_surgery.checkpoint.unpickle import map_tensors
from we_surgery.checkpoint.unwrap import Weights, unwrap
from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError

INDEX_ENDING = ".index.json"

# What a folder of weights holds, in the order transformers and accelerate look for it.
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SAVE_AGAIN = "Save or fetch all of it again."

Load = Callable[[str], Tensor]


class ShardedFiles(ABC):
    """Tensors that lie in several files, known by shape and dtype before any is read.

    Attributes:
        path: the index or the folder.
        tensors: each tensor by its name in the files, on the meta device.
        shards: the names in groups that are read together, each at most as large as the
            largest file.
    """

    kind: ClassVar[str]
    path: Path
    tensors: dict[str, Tensor]
    shards: list[list[str]]

    def checkpoint(self) -> Mapping[str, Any]:
        """What was saved, with tensors of the meta device; wrappers and all."""
        return self.tensors

    @abstractmethod
    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """Reads tensors of one shard by name, each once.

        They may be overwritten, and be used until it closes: one may be a view of the file, mapped
        so that what is written to it stays in memory.

        Raises:
            InputError: a file is missing, damaged, or does not hold what the index says.
        """

    def state_dict(
        self, key: str | None = None, weights: Weights | None = None
    ) -> ShardedStateDict:
        """The state dict in the files, without wrappers, with vanilla names.

        Args:
            key: as in :func:`~we_surgery.checkpoint.unwrap.unwrap`.
            weights: as there.

        Raises:
            InputError: there is none, or several and no ``key``.
        """
        try:
            state, notes = unwrap(self.checkpoint(), key, weights)
        except InputError as error:
            raise InputError(f"{self.path}: {error.cause}", error.cure) from error
        stored_as = {id(tensor): name for name, tensor in self.tensors.items()}
        stored = {}
        for name, tensor in state.items():
            # One in another shape than it is stored in is a view of that tensor.
            base = tensor if tensor._base is None else tensor._base
            if base.is_meta:
                stored[name] = stored_as[id(base)]
        return ShardedStateDict(self, state, stored, notes)


@dataclass(frozen=True)
class ShardedStateDict:
    """A state dict whose tensors are still in their files.

    Attributes:
        files: where they are.
        tensors: of the meta device, but for constants that are in no file.
        stored: the names in the files by the names here.
        notes: what was chosen and dropped, as sentences.
    """

    files: ShardedFiles
    tensors: dict[str, Tensor]
    stored: dict[str, str]
    notes: list[str]

    def shard_of(self) -> dict[str, int]:
        """The number of the shard that holds each tensor, by name."""
        shard_of = {key: i for i, keys in enumerate(self.files.shards) for key in keys}
        return {name: shard_of[key] for name, key in self.stored.items()}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """As :meth:`ShardedFiles.open`, by the names here; checked against the index."""
        with self.files.open(shard) as load_stored:

            def load(name: str) -> Tensor:
                expected = self.tensors[name]
                stored = self.files.tensors[self.stored[name]]
                tensor = load_stored(self.stored[name])
                if (tensor.shape, tensor.dtype) != (stored.shape, stored.dtype):
                    raise InputError(
                        f"{self.files.path} says that {name!r} is {_form(stored)}, and the file "
                        f"has {_form(tensor)}",
                        _SAVE_AGAIN,
                    )
                return tensor.reshape(expected.shape)

            yield load

    def load(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The state dict with the wanted tensors in memory; by default all."""
        loaded = dict(self.tensors)
        by_shard: dict[int, list[str]] = {}
        for name, shard in self.shard_of().items():
            if wanted(name):
                by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with self.open(shard) as load:
                loaded |= {name: load(name).clone() for name in names}
        return loaded


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
        found: dict[str, Tensor] = {}
        for file, kind, keys in zip(self.files, self.kinds, self.shards, strict=True):
            with _open_file(file, kind) as (known, _, describe):
                missing = [key for key in keys if key not in known]
                if missing:
                    raise InputError(
                        f"{path} says that {file.name} holds {quoted(missing)}, and it does not",
                        _SAVE_AGAIN,
                    )
                found |= {key: describe(key) for key in keys}
        self.tensors = {key: found[key] for key in names}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        with _open_file(self.files[shard], self.kinds[shard]) as (_, load, _):
            yield load


def open_sharded(source: str | Path) -> ShardedFiles | None:
    """The files of a sharded state dict; None where ``source`` is a single file or none.

    Raises:
        InputError: an index or a file of it is missing or damaged.
    """
    path = Path(source)
    if not _is_folder(path) and not path.name.endswith(INDEX_ENDING):
        return None
    path = resolve(path)
    if _is_folder(path):
        from we_surgery.checkpoint.dcp import DistributedCheckpoint

        return DistributedCheckpoint(path)
    return IndexedShards(path) if path.name.endswith(INDEX_ENDING) else None


def resolve(path: Path) -> Path:
    """A file as it is; of a folder the weights in it, or itself if it is one checkpoint.

    Raises:
        InputError: the folder holds no weights under a usual name.
    """
    if not _is_folder(path):
        return path
    if (path / ".metadata").is_file():
        return path
    usual = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    indices = list(path.glob(f"*{INDEX_ENDING}"))
    found = next(iter(usual or (indices if len(indices) == 1 else [])), None)
    if found is None:
        names = sorted(file.name for file in path.iterdir())
        raise InputError(
            f"{path} is a folder without weights under a usual name: it holds {quoted(names)}",
            "Give a file in it, or a folder of torch.distributed.checkpoint, transformers or "
            "accelerate.",
        )
    return found


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_file_name(path: Path, name: object) -> str:
    """The name, if it is that of a file beside or in ``path``.

    Raises:
        InputError: it leads elsewhere.
    """
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise InputError(f"{path} names a shard {name!r}, which is no file beside it", _SAVE_AGAIN)
    return name


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", "Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no index of shards: {error}", _SAVE_AGAIN) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"{path} is no index of shards: it has no 'weight_map'",
            "Give the *.index.json that lies beside the shards.",
        )
    return {key: check_file_name(path, name) for key, name in names.items()}


def _shard_kind(index: Path, file: Path) -> FileKind:
    if not file.exists():
        raise InputError(f"{index} names the shard {file.name}, which is missing", _SAVE_AGAIN)
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

        yield set(mapped), load_mapped, lambda key: mapped[key].to("meta")
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
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is a damaged or cut short safetensors file: {error}", _SAVE_AGAIN
        ) from error


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
