"""Folders of torch.distributed.checkpoint (DCP), read without a process group.

A folder holds one file per process, a sequence of ``torch.save``'d pieces of tensors, and
``.metadata``, a pickle with the places of the pieces. DCP unpickles it without checks; here it can
only make DCP's own records, so no code from the file runs.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from we_surgery.checkpoint.safe_pickle.recognize import FileKind, check_archive
from we_surgery.checkpoint.safe_pickle.unpickle import unpickle
from we_surgery.checkpoint.shards.files import Load, TensorFiles, check_file_name
from we_surgery.errors import InputError, damaged, quoted

# Plain dataclasses of DCP, by name: their modules differ between versions of torch.
_RECORDS = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex")
# What else it refers to; nothing of it is read but the dtype among the properties.
_UNREAD = {
    "TensorProperties",
    "BytesStorageMetadata",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
    "MEM_FORMAT_ENCODING",
}
_OTHERS_UNREAD = {
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("builtins", "getattr"),  # by which Python 3.11 pickles a member of an enum
}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where in which file it lies, in bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class DistributedCheckpoint(TensorFiles):
    """A folder that torch.distributed.checkpoint wrote."""

    kind = "dcp"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._objects: dict[str, Piece] = {}
        try:
            self._read(path / ".metadata")
        except InputError:
            raise
        # Any other effect of a doctored pickle: a missing attribute, a wrong type, no memory.
        except Exception as error:
            raise damaged(
                f"{path / '.metadata'} is damaged: {type(error).__name__}: {error}"
            ) from error
        self._check_files()
        self.shards = self._grouped()

    def _read(self, file: Path) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        described, stored = metadata.state_dict_metadata, metadata.storage_data
        paths = metadata.planner_data or {name: (name,) for name in described}
        # The planner's names are in the state dict's own order; the others in that of the files.
        order = [name for name in paths if name in described]
        order += [name for name in described if name not in paths]
        self._paths = {name: tuple(map(str, paths.get(name, (name,)))) for name in order}
        for name in order:
            tensor = described[name]
            if isinstance(tensor, TensorStorageMetadata):
                properties: Any = tensor.properties  # an _Unread
                size, dtype = _numbers(tensor.size), properties.state[0]
                pieces = [_piece(self.path, name, chunk, stored) for chunk in tensor.chunks]
                _check_pieces(self.path, name, size, pieces)
                self.tensors[name] = torch.empty(size, dtype=dtype, device="meta")
                self._pieces[name] = pieces
            elif (index := MetadataIndex(name)) in stored:
                self._objects[name] = _place(self.path, name, stored[index])

    def _check_files(self) -> None:
        for name, pieces in self._pieces.items():
            for piece in pieces:
                file = self.path / piece.file
                if not file.is_file() or piece.start + piece.length > file.stat().st_size:
                    what = "cut short" if file.is_file() else "missing"
                    raise damaged(f"{file}, which holds a piece of {name!r}, is {what}")

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

    def checkpoint(self, objects: Collection[str] = ()) -> Mapping[str, Any]:
        nested: dict[str, Any] = {}
        for name, path in self._paths.items():
            holder = nested
            for key in path[:-1]:
                holder = holder.setdefault(key, {})
            if name in self._objects and path[-1] in objects:
                holder[path[-1]] = self._open_piece(name, self._objects[name])
            else:
                # Bytes are objects other than tensors, and are not read.
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
            found = self._open_piece(name, piece)
            form = (tuple(found.shape), found.dtype) if isinstance(found, Tensor) else type(found)
            if form != (piece.sizes, expected.dtype):
                raise damaged(
                    f"the piece of {name!r} in {self.path / piece.file} is {form}, but .metadata "
                    f"says {(piece.sizes, expected.dtype)}"
                )
            part: Tensor = found.detach()
            if part.shape == expected.shape:
                return part
            if whole.shape != expected.shape:
                whole = torch.empty(expected.shape, dtype=expected.dtype)
                filled = torch.zeros(expected.shape, dtype=torch.bool)
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            whole[box] = part
            filled[box] = True
        if not filled.all():
            raise damaged(f"the pieces of {name!r} in {self.path} do not fill it")
        return whole

    def _open_piece(self, name: str, piece: Piece) -> Any:
        path = self.path / piece.file
        try:
            with path.open("rb") as file:
                content = io.BufferedReader(_Window(file, piece.start, piece.length))
                check_archive(content, path)
                return unpickle(path, FileKind.ZIP, content=content)
        except (InputError, OSError, MemoryError) as error:
            cause = error.cause if isinstance(error, InputError) else str(error)
            raise damaged(f"{path} cannot be read where it holds {name!r}: {cause}") from error


class _Window(io.RawIOBase):
    """A part of a file as a file of its own; torch's own view of one seeks wrongly from its end."""

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


class _Unread:
    """Stands for what the metadata holds and nobody reads; keeps the state it is given."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The one in Python: the one in C reserves memory for any memo index that a file names.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import filesystem, metadata

        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module.startswith("torch.distributed."):
            if name in _RECORDS:
                return vars(metadata)[name]
            if name == "_StorageInfo":
                return filesystem._StorageInfo
            if name in _UNREAD:
                return _Unread
        if (module, name) in _OTHERS_UNREAD:
            return _Unread
        raise InputError(
            f"the .metadata is refused: it refers to {module}.{name}, which is not on the list of "
            "allowed classes",
            "Give a folder that torch.distributed.checkpoint wrote with its own planner.",
        )


def _numbers(sizes: Any) -> tuple[int, ...]:
    numbers = tuple(sizes)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise damaged(f"the .metadata has a shape {numbers}")
    return numbers


def _piece(folder: Path, name: str, chunk: Any, stored: Mapping[Any, Any]) -> Piece:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
    index = MetadataIndex(name, offsets)
    if index not in stored:
        raise damaged(f"{folder} does not say where {name!r} is")
    return _place(folder, name, stored[index], offsets, sizes)


def _place(
    folder: Path, name: str, info: Any, offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()
) -> Piece:
    if info.transform_descriptors:
        raise InputError(
            f"{name!r} in {folder} was saved with extensions: {quoted(info.transform_descriptors)}",
            "Save it without extensions (`FileSystemWriter(..., _extensions=None)`).",
        )
    start, length = _numbers((info.offset, info.length))
    return Piece(offsets, sizes, check_file_name(folder, info.relative_path), start, length)


def _check_pieces(folder: Path, name: str, size: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Raises unless the pieces lie in the tensor and have as many values as it."""
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(size)
        and all(o + n <= s for o, n, s in zip(piece.offsets, piece.sizes, size, strict=True))
        for piece in pieces
    )
    if not (inside and pieces) or sum(math.prod(p.sizes) for p in pieces) != math.prod(size):
        raise damaged(f"the pieces of {name!r} in {folder} do not fill its {size}")
