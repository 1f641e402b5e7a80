"""Writing files whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter
from we_surgery.checkpoint.staging import staged
from we_surgery.errors import InputError, SurgeryError


def write(
    content: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    kind: str,
    *,
    metadata: Metadata | None = None,
    force: bool = False,
) -> None:
    """Writes a model, or a state dict of the kind ``state_dict`` or ``safetensors``."""
    with staged(path, force=force) as temporary:
        write_to(content, temporary, kind, metadata)


def write_to(
    content: nn.Module | Mapping[str, Tensor],
    temporary: Path,
    kind: str,
    metadata: Metadata | None = None,
) -> None:
    """:func:`write` to a name of :func:`staged`.

    A state dict with metadata becomes ``{"we_surgery": ..., "state_dict": content}``. Safetensors
    has the metadata in the header. It knows neither ties nor memory formats: tied tensors are
    written once for each key, so that strict loading finds all of them.
    """
    if isinstance(content, nn.Module):
        _torch_save(content, temporary)
    elif kind == "safetensors":
        _write_safetensors(content, temporary, metadata)
    elif metadata is None:
        _torch_save(content if isinstance(content, dict) else dict(content), temporary)
    else:
        _torch_save({METADATA_KEY: metadata.to_dict(), "state_dict": content}, temporary)


def write_bytes(content: bytes, path: str | Path, *, force: bool = False) -> None:
    """Writes a file of any other kind."""
    with staged(path, force=force) as temporary:
        temporary.write_bytes(content)


def _write_safetensors(
    state: Mapping[str, Tensor], temporary: Path, metadata: Metadata | None
) -> None:
    for name, tensor in state.items():
        # A module's extra state is any object.
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"safetensors holds only tensors, and {name!r} is of type {type(tensor).__name__}",
                "Write a state dict or a module by torch.save instead (--to state_dict, or --to "
                "module).",
            )
    with SafetensorsWriter(temporary, state, header_texts(metadata)) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)


def header_texts(metadata: Metadata | None) -> dict[str, str]:
    """The metadata as the header of a safetensors file has it."""
    return {} if metadata is None else {METADATA_KEY: metadata.to_json()}


def _torch_save(content: Any, temporary: Path) -> None:
    # Given a path, torch would write the temporary name into the archive.
    with temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except (OSError, MemoryError):
            raise
        # Pickling runs the __reduce__ of whatever the model holds, which can raise anything.
        except Exception as error:
            # torch's writer complains of its own state after the disk did.
            if (disk := _disk_error(error)) is not None:
                raise disk from error
            raise SurgeryError(
                f"the {'model' if isinstance(content, nn.Module) else 'state dict'} cannot be "
                f"pickled: {type(error).__name__}: {error}",
                "Write its state dict instead (--to state_dict), or define what it refers to at "
                "the top level of a module.",
            ) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
