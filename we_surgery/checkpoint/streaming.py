"""Safetensors files read and written one tensor at a time, so that one alone is in memory.

safetensors' own writer takes all tensors of a file at once, and its reader maps the file, of which
whatever was read stays in memory, at addresses of any alignment. The format: eight bytes with the
length of a header of JSON, which gives each tensor's dtype, shape and place; then the values.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from we_surgery.errors import InputError

# The values begin at a multiple of this, so that every dtype is aligned.
_ALIGNMENT = 64
_PIECE = 2**22
_CURE = "Write a state dict by torch.save instead (--to state_dict)."

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
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


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order.

    Args:
        path: the file to write.
        tensors: all that will be written, by name, for their shapes and dtypes alone: tensors
            of the meta device will do. In the file they stand in this order, wider dtypes first.

    Raises:
        InputError: the format has no such dtype.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
            tensor = tensors[name]
            if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
                what = tensor.dtype if tensor.layout == torch.strided else tensor.layout
                raise InputError(f"safetensors cannot hold {name!r} of {what}", _CURE)
            start, end = end, end + tensor.nbytes
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
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors.

        Raises:
            InputError: it has no values.
        """
        if tensor.is_meta:
            raise InputError(f"safetensors cannot hold {name!r}, which has no values", _CURE)
        start, end = self._spans[name]
        values = _bytes_of(tensor.detach().contiguous())
        assert values.numel() == end - start
        self._file.seek(self._start + start)
        self._file.write(values.numpy().data)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether the file now holds the tensor, in every bit, NaNs too; read in pieces."""
        start, end = self._spans[name]
        values = _bytes_of(tensor.detach().contiguous())
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
    """Reads tensors of a safetensors file into memory of their own.

    Args:
        path: a file whose header safetensors has found right.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self._start = 8 + length

    def read(self, name: str, like: Tensor) -> Tensor:
        """One of the tensors.

        Args:
            name: its name.
            like: its shape and dtype; of the meta device.

        Raises:
            ValueError: the file changed since, or ends too early.
        """
        start, end = self._header[name]["data_offsets"]
        tensor = _mapped(like)
        self._file.seek(self._start + start)
        read = self._file.readinto(_bytes_of(tensor).numpy().data) if tensor.nbytes else 0
        if not read == tensor.nbytes == end - start:
            raise ValueError(f"it has {read} bytes where {name!r} should be")
        return tensor

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _mapped(like: Tensor) -> Tensor:
    """An empty tensor whose memory goes back to the system with it.

    What an allocator keeps for later, and cannot use for the next large tensor, is several times
    one of them.
    """
    memory = mmap.mmap(-1, max(like.nbytes, 1))
    return (
        torch.frombuffer(memory, dtype=torch.uint8)[: like.nbytes].view(like.dtype).view(like.shape)
    )


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as numbers of one byte."""
    # Where a view is conjugated or negated lazily, its memory does not say so.
    return tensor.resolve_conj().resolve_neg().view(-1).view(torch.uint8)
