"""Reads and writes safetensors files with one tensor in memory at a time.

safetensors' writer needs all tensors of a file at once; its reader maps the file, whose pages stay
in memory once read, at any alignment. The format: eight bytes with the length of a JSON header,
which has each tensor's dtype, shape and place; then the values.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from we_surgery.errors import InputError, damaged

# The values begin at a multiple of this, so that every dtype is aligned.
_ALIGNMENT = 64
_PIECE = 2**22
_HINT = "Write a state dict by torch.save instead (--to state_dict)."

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order.

    Args:
        path: the file to write.
        tensors: all tensors of the file, by name; only shapes and dtypes are used, so they may be
            on the meta device. The file has them in this order, wider dtypes first.
        metadata: texts of the header.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
            tensor = tensors[name]
            if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
                what = tensor.dtype if tensor.layout == torch.strided else tensor.layout
                raise InputError(f"safetensors cannot hold {name!r} of {what}", _HINT)
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._spans[name] = (start, end)
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._file: IO[bytes] = path.open("w+b")
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._start + end)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors."""
        if tensor.is_meta:
            raise InputError(f"safetensors cannot hold {name!r}, which has no values", _HINT)
        start, end = self._spans[name]
        values = _bytes_of(tensor)
        assert values.numel() == end - start
        self._file.seek(self._start + start)
        self._file.write(values.numpy().data)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether the file now holds the tensor, in every bit, NaNs too; read in pieces."""
        start, end = self._spans[name]
        values = _bytes_of(tensor)
        if values.numel() != end - start:
            return False
        self._file.seek(self._start + start)
        buffer = torch.empty(min(_PIECE, end - start), dtype=torch.uint8)
        for piece in torch.split(values, _PIECE):
            found = buffer[: piece.numel()]
            if self._file.readinto(found.numpy()) != piece.numel():  # type: ignore[attr-defined]
                return False
            if not torch.equal(found, piece):
                return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class SafetensorsReader:
    """Reads tensors of a safetensors file into their own memory."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        with _readable(path):
            # It checks that all places in the header lie in the file, without gaps or overlaps.
            with safe_open(path, framework="pt", device="cpu") as checked:
                names = checked.offset_keys()
            self._file = path.open("rb")
            length = int.from_bytes(self._file.read(8), "little")
            header: dict[str, Any] = json.loads(self._file.read(length))
            self._start = 8 + length
            self.metadata: dict[str, str] = header.get("__metadata__") or {}
            self._spans = {name: header[name]["data_offsets"] for name in names}
            self.tensors = {name: _described(header[name]) for name in names}

    def read(self, name: str) -> Tensor:
        """One of the tensors."""
        start, end = self._spans[name]
        with _readable(self._path):
            tensor = _mapped(self.tensors[name])
            self._file.seek(self._start + start)
            read = self._file.readinto(_bytes_of(tensor).numpy().data) if tensor.nbytes else 0
            if not read == tensor.nbytes == end - start:
                raise ValueError(f"it has {read} bytes where {name!r} should be")
        return tensor

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise damaged(f"{file} is a damaged or cut short safetensors file: {error}") from error


def _described(entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _BY_NAME:
        raise ValueError(f"the dtype {entry['dtype']} is not supported")
    return torch.empty(entry["shape"], dtype=_BY_NAME[entry["dtype"]], device="meta")


def _mapped(like: Tensor) -> Tensor:
    """An empty tensor whose memory returns to the system with it.

    An allocator would keep several times a large tensor's memory that the next one cannot use.
    """
    memory = mmap.mmap(-1, max(like.nbytes, 1))
    return (
        torch.frombuffer(memory, dtype=torch.uint8)[: like.nbytes].view(like.dtype).view(like.shape)
    )


def _bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's values as numbers of one byte, in its own memory where it is contiguous."""
    # A lazily conjugated or negated view has a flag that its memory lacks.
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return plain.view(-1).view(torch.uint8)
