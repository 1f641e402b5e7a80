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


def write_module(model: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Writes a whole model with ``torch.save``."""
    with staged(path, force=force) as temporary:
        save_module(model, temporary)


def write_state_dict(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Metadata | None,
    force: bool = False,
) -> None:
    """Writes a state dict with ``torch.save``; tied tensors stay tied.

    With metadata the file holds ``{"we_surgery": ..., "state_dict": state}``.
    """
    with staged(path, force=force) as temporary:
        save_state_dict(state, temporary, metadata)


def write_safetensors(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Metadata | None,
    force: bool = False,
) -> None:
    """Writes a state dict as safetensors, with its metadata in the header.

    The format knows neither ties nor memory formats: tied tensors are written once for each key, so
    that strict loading finds all of them, and tensors in other memory formats become contiguous.
    """
    with staged(path, force=force) as temporary:
        save_safetensors(state, temporary, metadata)


def write_bytes(content: bytes, path: str | Path, *, force: bool = False) -> None:
    """Writes a file of any other kind."""
    with staged(path, force=force) as temporary:
        temporary.write_bytes(content)


def save_module(model: nn.Module, temporary: Path) -> None:
    """:func:`write_module` to a name of :func:`staged`."""
    _torch_save(model, temporary)


def save_state_dict(
    state: Mapping[str, Tensor], temporary: Path, metadata: Metadata | None
) -> None:
    """:func:`write_state_dict` to a name of :func:`staged`."""
    content: Any = state if isinstance(state, dict) else dict(state)
    if metadata is not None:
        content = {METADATA_KEY: metadata.to_dict(), "state_dict": content}
    _torch_save(content, temporary)


def save_safetensors(
    state: Mapping[str, Tensor], temporary: Path, metadata: Metadata | None
) -> None:
    """:func:`write_safetensors` to a name of :func:`staged`."""
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
