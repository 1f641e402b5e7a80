"""Writing files whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.staging import staged
from we_surgery.errors import InputError, SurgeryError


def write_module(model: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Writes a whole model with ``torch.save``.

    Raises:
        InputError: the target cannot be written to, or exists without ``force``.
        SurgeryError: the model cannot be pickled, or writing failed; the target is as it was.
    """
    with staged(path, force=force) as temporary:
        save_module(model, temporary)


def save_module(model: nn.Module, temporary: Path) -> None:
    """:func:`write_module` to a name of :func:`staged`."""
    _torch_save(model, temporary)


def write_state_dict(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Metadata | None,
    force: bool = False,
) -> None:
    """Writes a state dict with ``torch.save``: bare, or with what describes it beside it.

    Args:
        state: the tensors; tied ones stay tied in the file.
        path: the file to write.
        metadata: with it the file holds ``{"we_surgery": ..., "state_dict": state}``.
        force: overwrite an existing file.

    Raises:
        InputError: the target cannot be written to, or exists without ``force``.
        SurgeryError: writing failed; the target is as it was.
    """
    with staged(path, force=force) as temporary:
        save_state_dict(state, temporary, metadata)


def save_state_dict(
    state: Mapping[str, Tensor], temporary: Path, metadata: Metadata | None
) -> None:
    """:func:`write_state_dict` to a name of :func:`staged`."""
    content: Any = state if isinstance(state, dict) else dict(state)
    if metadata is not None:
        content = {METADATA_KEY: metadata.to_dict(), "state_dict": content}
    _torch_save(content, temporary)


def write_safetensors(
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    metadata: Metadata | None,
    force: bool = False,
) -> None:
    """Writes a state dict as safetensors, with its metadata in the header.

    The format knows neither ties nor memory formats nor an order of its own: tied tensors are
    written once for each key, so that strict loading finds all of them, and tensors in other
    memory formats become contiguous.

    Args:
        state: the tensors.
        path: the file to write.
        metadata: kept as JSON under the key ``we_surgery``.
        force: overwrite an existing file.

    Raises:
        InputError: a tensor cannot be stored in this format, the target cannot be written to,
            or it exists without ``force``.
        SurgeryError: writing failed; the target is as it was.
    """
    with staged(path, force=force) as temporary:
        save_safetensors(state, temporary, metadata)


def save_safetensors(
    state: Mapping[str, Tensor], temporary: Path, metadata: Metadata | None
) -> None:
    """:func:`write_safetensors` to a name of :func:`staged`."""
    from safetensors.torch import save_file

    header = {"format": "pt"}
    if metadata is not None:
        header[METADATA_KEY] = metadata.to_json()
    tensors = _independent(state)
    try:
        save_file(tensors, temporary, metadata=header)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"safetensors cannot hold these tensors: {error}",
            "Write a state dict by torch.save instead (--to state_dict).",
        ) from error


def write_bytes(content: bytes, path: str | Path, *, force: bool = False) -> None:
    """Writes a file of any other kind.

    Raises:
        InputError: the target cannot be written to, or exists without ``force``.
        SurgeryError: writing failed; the target is as it was.
    """
    with staged(path, force=force) as temporary:
        temporary.write_bytes(content)


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
                "Write its state dict instead (--to state_dict), or define what it names at the "
                "top level of a module.",
            ) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous and, where several share a storage, in memory of its own."""
    for name, tensor in state.items():
        # A module's extra state is any object.
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"safetensors holds tensors alone, and {name!r} is of type {type(tensor).__name__}",
                "Write a state dict or a module by torch.save instead (--to state_dict, or --to "
                "module).",
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(
                f"safetensors cannot hold {name!r}, which is sparse, quantized or without values",
                "Write a state dict by torch.save instead (--to state_dict).",
            )
    # A conjugate or negative view says so in a bit beside its memory, which alone is written.
    plain = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in state.items()}
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        if storages[tensor.untyped_storage().data_ptr()] > 1
        else tensor.contiguous()
        for name, tensor in plain.items()
    }
