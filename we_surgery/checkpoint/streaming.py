"""A safetensors file whose tensors are written one at a time, so that one alone is in memory.

safetensors' own writer takes all tensors of a file at once. The format: eight bytes with the
length of a header of JSON, which gives each tensor's dtype, shape and place; then the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

from we_surgery.errors import InputError

# The values begin at a multiple of this, so that every dtype is aligned.
_ALIGNMENT = 64

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
            if tensor.dtype not in _DTYPES:
                raise InputError(
                    f"safetensors cannot hold {name!r} of {tensor.dtype}",
                    "Write a state dict by torch.save instead (--to state_dict).",
                )
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
        """Writes one of the tensors."""
        start, end = self._spans[name]
        values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        assert values.nbytes == end - start
        self._file.seek(self._start + start)
        self._file.write(values.data)

    def read(self, name: str, like: Tensor) -> Tensor:
        """What the file now holds under a name, in the dtype and shape of ``like``."""
        start, end = self._spans[name]
        self._file.seek(self._start + start)
        content = bytearray(end - start)
        self._file.readinto(content)  # type: ignore[attr-defined]
        return _from_bytes(content, like)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _from_bytes(content: bytearray, like: Tensor) -> Tensor:
    if not content:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(like.dtype).reshape(like.shape)
