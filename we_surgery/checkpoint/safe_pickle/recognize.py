"""Tells the kind of a file by its first bytes, not by its name."""

from __future__ import annotations

import enum
import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from we_surgery.errors import InputError, damaged, no_such_file

_EAGER = (
    "Give the eager model saved with `torch.save(model, ...)`, or its state_dict with --arch "
    "(`architecture=`)."
)
_KNOWN_FORMATS = (
    "Give a file written by torch.save or safetensors. If this was one, download or save it again."
)
_CHUNK = 1 << 20
_TO_TORCH = (
    "Load it with the framework that wrote it, put its weights into a PyTorch model, and save that "
    "model's state dict with torch.save or safetensors."
)
# What other files begin with, what they are, and what to do.
_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, such as Keras writes", _TO_TORCH),
    (
        b"GGUF",
        "is a GGUF file, made for inference and mostly quantized",
        "Give the PyTorch or safetensors checkpoint that it was made from.",
    ),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer: the file itself was not fetched",
        "Run `git lfs pull` in its repository, or download the file itself.",
    ),
    (b"\x93NUMPY", "is a NumPy array", "Save a state dict with torch.save or safetensors."),
    (b"\x1f\x8b", "is compressed by gzip", "Unpack it (gunzip), and give the file inside."),
)
_ONNX = (
    "Give the PyTorch model or checkpoint that it was exported from; strip, then export it again."
)
# `pickle.dump(MAGIC_NUMBER, file, protocol=2)`, with which torch.save began until 1.6.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class FileKind(enum.Enum):
    """The formats that can be read."""

    SAFETENSORS = "safetensors"
    ZIP = "zip"
    LEGACY = "legacy"


def recognize(path: Path) -> FileKind:
    """The format of a file that may hold an eager model or weights."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder", "Give a file in it.")
        # A pipe would never begin, and a device never end.
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file", "Give a file that was written whole.")
        with path.open("rb") as file:
            start = file.read(64)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise no_such_file(path) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "Check its permissions.") from error
    if not start:
        raise damaged(f"{path} is empty")
    if start.startswith(b"PK\x03\x04"):
        return _recognize_zip(path)
    # Read as a tar by torch.load, whatever else the same bytes may mean.
    if _is_tar(path):
        raise InputError(f"{path} is a tar archive", "Unpack it, and give the file inside.")
    if start.startswith(_LEGACY_START):
        return FileKind.LEGACY
    _refuse_foreign(start, path)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and len(start) > 8:
        if header + 8 > size:
            raise damaged(f"{path} is cut short: {size} bytes, and its header alone has {header}")
        return FileKind.SAFETENSORS
    if _LEGACY_START.startswith(start):
        raise damaged(f"{path} is cut short after {size} bytes")
    if start[:1] == b"\x80":
        raise InputError(f"{path} is a pickle that torch.save did not write", _KNOWN_FORMATS)
    raise InputError(
        f"{path} does not hold a model or weights: it begins with {start[:24]!r}", _KNOWN_FORMATS
    )


def _refuse_foreign(start: bytes, path: Path) -> None:
    """Raises where a file is known to be of another kind."""
    for begin, what, cure in _FOREIGN:
        if start.startswith(begin):
            raise InputError(f"{path} {what}", cure)
    if start[4:8] == b"TFL3":
        raise InputError(f"{path} is a TensorFlow Lite model", _TO_TORCH)
    # Field 1 of a SavedModel is the number of its schema, always 1: no ONNX model is that old.
    if start.startswith(b"\x08\x01\x12"):
        raise InputError(f"{path} is a TensorFlow SavedModel", _TO_TORCH)
    # An ONNX model has no mark: field 1 is its version, and field 2, or 7, or 8 follows.
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x3a", b"\x42"):
        raise InputError(f"{path} is an ONNX model, whose layers cannot be changed", _ONNX)
    if path.suffix == ".index" or ".data-0" in path.name:
        raise InputError(f"{path} is a part of a TensorFlow checkpoint", _TO_TORCH)


def _is_tar(path: Path) -> bool:
    try:
        # Unlike tarfile.is_tarfile this unpacks nothing: a packed file could be of any size.
        tarfile.open(path, "r:").close()
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return False
    return True


def check_archive(content: IO[bytes], path: Path) -> None:
    """Raises if the bytes, which lie somewhere in a file, are not an archive or set a trap."""
    size = content.seek(0, io.SEEK_END)
    _refuse_traps(_records(content, path), size, path)
    content.seek(0)


def _recognize_zip(path: Path) -> FileKind:
    records = _records(path, path)
    names = {record.filename.partition("/")[2] or record.filename for record in records}
    if "constants.pkl" in names:
        raise InputError(f"{path} is TorchScript, whose layers cannot be changed", _EAGER)
    if {"archive_format", "serialized_exported_program.json"} & names:
        raise InputError(
            f"{path} is a torch.export archive, whose layers cannot be changed", _EAGER
        )
    if "model.weights.h5" in names:
        raise InputError(f"{path} is a Keras model", _TO_TORCH)
    if any(name.endswith(".npy") for name in names):
        raise InputError(f"{path} is an archive of NumPy arrays", _KNOWN_FORMATS)
    if "data.pkl" not in names:
        raise InputError(f"{path} is a zip archive that torch.save did not write", _KNOWN_FORMATS)
    _refuse_traps(records, path.stat().st_size, path)
    _refuse_wrong_bits(path)
    return FileKind.ZIP


def _refuse_wrong_bits(path: Path) -> None:
    """Raises where a record does not fit its checksum, which torch.load does not look at.

    Torch can leave out the checksums: all are wrong then.
    """
    right, wrong = 0, []
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as content:
                    while content.read(_CHUNK):
                        pass
            except (zipfile.BadZipFile, RuntimeError, OSError, ValueError, EOFError):
                wrong.append(record.filename)
            else:
                right += record.file_size > 0
    if right and wrong:
        raise damaged(
            f"{path} is damaged: the record {wrong[0]!r} does not fit its checksum"
            + (f", nor do {len(wrong) - 1} others" if len(wrong) > 1 else "")
        )


def _records(content: Path | IO[bytes], path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(content) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise damaged(f"{path} is a damaged or cut short zip archive: {error}") from error


def _refuse_traps(records: Sequence[zipfile.ZipInfo], size: int, path: Path) -> None:
    # Either could make a small file fill the memory, or show each reader something else.
    packed = next((r for r in records if r.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise InputError(
            f"{path} has a compressed record {packed.filename!r}, and torch.save compresses none",
            "Save it again with torch.save, or unzip it and zip it without compression.",
        )
    if (
        len({record.filename for record in records}) < len(records)
        or sum(record.file_size for record in records) > size
    ):
        raise damaged(f"{path} is a damaged or doctored zip archive: its records repeat or overlap")
