"""Folders of torch.distributed.checkpoint (DCP), read without a process group.

A folder holds one file a process, each a row of ``torch.save``'d pieces of tensors, and
``.metadata``, a pickle that says which piece is where. DCP itself unpickles that file as it is;
here it is read with stand-ins in place of the classes it names, so that nothing of it runs.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from we_surgery.checkpoint.recognize import FileKind, check_archive
from we_surgery.checkpoint.sharded import Load, ShardedFiles, check_file_name
from we_surgery.checkpoint.unpickle import unpickle
from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError

_SAVE_AGAIN = "Save or fetch the whole folder again."

# What DCP writes, under the modules of several versions of torch.
_RECORDS = {
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
    "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_StorageInfo",
    "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING",
}  # fmt: skip
_OTHERS = {
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("builtins", "getattr"),  # by which Python 3.11 pickles a member of an enum
}
_DATA = {("torch", "Size"): torch.Size, ("collections", "OrderedDict"): OrderedDict}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where in which file it lies.

    Attributes:
        offsets: its first index in each dimension.
        sizes: its shape.
        file: the file's name.
        start: its first byte there.
        length: in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistributedCheckpoint(ShardedFiles):
    """A folder that torch.distributed.checkpoint wrote.

    Raises:
        InputError: its metadata is damaged, names what it may not name, or does not fit
            together.
    """

    kind = "dcp"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read(path / ".metadata")
        except InputError:
            raise
        # Whatever else a doctored pickle leads to: no attribute, no number, no memory.
        except Exception as error:
            raise InputError(
                f"{path / '.metadata'} is damaged: {type(error).__name__}: {error}", _SAVE_AGAIN
            ) from error

    def _read(self, file: Path) -> None:
        metadata = _fields(_unpickled(file.read_bytes()), "Metadata")
        described: dict[str, Any] = metadata["state_dict_metadata"]
        stored = {_index_key(index): info for index, info in metadata["storage_data"].items()}
        paths = metadata.get("planner_data") or {name: (name,) for name in described}
        # The planner's names are in the state dict's own order; the others in that of the files.
        order = [name for name in paths if name in described]
        order += [name for name in described if name not in paths]
        self._paths = {name: tuple(map(str, paths.get(name, (name,)))) for name in order}
        self.tensors = {}
        self._pieces: dict[str, list[Piece]] = {}
        for name in order:
            if type(described[name]).__name__ == "TensorStorageMetadata":
                fields = _fields(described[name], "TensorStorageMetadata")
                size, dtype = _numbers(fields["size"]), _dtype(fields["properties"])
                pieces = [_piece(self.path, name, box, stored) for box in fields["chunks"]]
                _check_pieces(self.path, name, size, pieces)
                self.tensors[name] = torch.empty(size, dtype=dtype, device="meta")
                self._pieces[name] = pieces
        self._check_files()
        self.shards = self._grouped()

    def _check_files(self) -> None:
        for name, pieces in self._pieces.items():
            for piece in pieces:
                file = self.path / piece.file
                if not file.is_file() or piece.start + piece.length > file.stat().st_size:
                    what = "cut short" if file.is_file() else "missing"
                    raise InputError(
                        f"{file}, which holds a piece of {name!r}, is {what}", _SAVE_AGAIN
                    )

    def _grouped(self) -> list[list[str]]:
        """The tensors in order, in groups no larger than the largest file or tensor."""
        files = {piece.file for pieces in self._pieces.values() for piece in pieces}
        limit = max(((self.path / file).stat().st_size for file in files), default=0)
        groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in self.tensors.items():
            if groups[-1] and size + tensor.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor.nbytes
        return groups

    def checkpoint(self) -> Mapping[str, Any]:
        nested: dict[str, Any] = {}
        for name, path in self._paths.items():
            holder = nested
            for key in path[:-1]:
                holder = holder.setdefault(key, {})
            # What is no tensor is not read: bytes stand for it.
            holder[path[-1]] = self.tensors.get(name, b"")
        return nested

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        yield self._load

    def _load(self, name: str) -> Tensor:
        expected = self.tensors[name]
        whole = torch.empty(0)
        filled = torch.zeros(0, dtype=torch.bool)
        for piece in self._pieces[name]:
            part = self._load_piece(name, piece)
            if (tuple(part.shape), part.dtype) != (piece.sizes, expected.dtype):
                raise InputError(
                    f"the piece of {name!r} in {self.path / piece.file} is {tuple(part.shape)} of "
                    f"{part.dtype}, and .metadata says {piece.sizes} of {expected.dtype}",
                    _SAVE_AGAIN,
                )
            if part.shape == expected.shape:
                return part
            if whole.shape != expected.shape:
                whole = torch.empty(expected.shape, dtype=expected.dtype)
                filled = torch.zeros(expected.shape, dtype=torch.bool)
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            whole[box] = part
            filled[box] = True
        if not filled.all():
            raise InputError(f"the pieces of {name!r} in {self.path} do not fill it", _SAVE_AGAIN)
        return whole

    def _load_piece(self, name: str, piece: Piece) -> Tensor:
        path = self.path / piece.file
        try:
            with path.open("rb") as file:
                content = io.BufferedReader(_Window(file, piece.start, piece.length))
                check_archive(content, path)
                part = unpickle(path, FileKind.ZIP, content=content)
        except (InputError, OSError, MemoryError) as error:
            cause = error.cause if isinstance(error, InputError) else str(error)
            raise InputError(
                f"{path} cannot be read where it holds {name!r}: {cause}", _SAVE_AGAIN
            ) from error
        if not isinstance(part, Tensor):
            raise InputError(
                f"{self.path / piece.file} holds {type(part).__name__} where {name!r} should be",
                _SAVE_AGAIN,
            )
        return part.detach()


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, so that nothing is read twice."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(origin + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._file.seek(self._start + self._at)
        read = self._file.readinto(wanted)
        self._at += read
        return read


class _Record:
    """Stands for any object of a class that the metadata names; keeps what it is given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The one in Python: the one in C reserves memory for any memo index that a file names.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DATA:
            return _DATA[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        is_dcp = module.startswith("torch.distributed.") and name in _RECORDS
        if is_dcp or (module, name) in _OTHERS:
            return type(name, (_Record,), {})
        raise InputError(
            f"the .metadata names what a file may not name: {module}.{name}",
            "Give a folder that torch.distributed.checkpoint wrote with its own planner.",
        )


def _unpickled(content: bytes) -> Any:
    return _Unpickler(io.BytesIO(content)).load()


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The fields of a stand-in.

    Raises:
        InputError: it stands for another class.
    """
    fields = getattr(record, "state", None)
    if type(record).__name__ != kind or not isinstance(fields, dict):
        raise InputError(
            f"the .metadata holds {type(record).__name__} where {kind} should be", _SAVE_AGAIN
        )
    return fields


def _numbers(sizes: Any) -> tuple[int, ...]:
    numbers = tuple(sizes)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"the .metadata has a shape {numbers}", _SAVE_AGAIN)
    return numbers


def _dtype(properties: Any) -> torch.dtype:
    state = getattr(properties, "state", None)
    if not isinstance(state, tuple) or not isinstance(state[0], torch.dtype):
        raise InputError("the .metadata has a tensor without a dtype", _SAVE_AGAIN)
    return state[0]


def _index_key(index: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(index, "MetadataIndex")
    offset = fields.get("offset")
    return fields["fqn"], None if offset is None else _numbers(offset)


def _piece(folder: Path, name: str, box: Any, stored: Mapping[Any, Any]) -> Piece:
    fields = _fields(box, "ChunkStorageMetadata")
    offsets, sizes = _numbers(fields["offsets"]), _numbers(fields["sizes"])
    if (name, offsets) not in stored:
        raise InputError(f"{folder} does not say where {name!r} is", _SAVE_AGAIN)
    info = _fields(stored[name, offsets], "_StorageInfo")
    if info.get("transform_descriptors"):
        raise InputError(
            f"{name!r} in {folder} is stored through {quoted(info['transform_descriptors'])}",
            "Save it without extensions (`FileSystemWriter(..., _extensions=None)`).",
        )
    start, length = _numbers((info["offset"], info["length"]))
    return Piece(offsets, sizes, check_file_name(folder, info["relative_path"]), start, length)


def _check_pieces(folder: Path, name: str, size: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Raises unless the pieces lie in the tensor and have as many values as it."""
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(size)
        and all(o + n <= s for o, n, s in zip(piece.offsets, piece.sizes, size, strict=True))
        for piece in pieces
    )
    if not (inside and pieces) or sum(math.prod(p.sizes) for p in pieces) != math.prod(size):
        raise InputError(f"the pieces of {name!r} in {folder} do not fill its {size}", _SAVE_AGAIN)
