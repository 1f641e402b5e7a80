"""Writing files whole or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError, SurgeryError, WESurgeryError

logger = logging.getLogger(__name__)

_ELSEWHERE = "Give another file to write (-o FILE)."

# What has a name here is made by the system, and a link among them is no file of the user's.
_SYSTEM_FOLDERS = (Path("/dev"), Path("/proc"), Path("/sys"))
_MEMORY_FOLDER = Path("/dev/shm")


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


def check_target(path: str | Path, *, force: bool = False, folder: bool = False) -> None:
    """Checks that a file can be written, before any work is done for it.

    Args:
        path: the target.
        force: whether it may exist.
        folder: whether a folder of shards is to be written and not a file.

    Raises:
        InputError: it exists without ``force``, is of the other kind or holds other files than
            shards, or its folder is missing or not writable.
    """
    path = Path(path)
    try:
        _refuse_system_folders(path)
        if folder:
            _check_folder(path)
        elif path.is_dir():
            raise InputError(f"{path} is a folder", _ELSEWHERE)
        elif path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file", _ELSEWHERE)
        if (path.exists() or path.is_symlink()) and not force:
            raise _exists_already(path)
        folder_exists = path.parent.is_dir()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}", _ELSEWHERE) from error
    if not folder_exists:
        raise InputError(f"there is no folder {path.parent}", "Create it, or give another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder {path.parent} is not writable", _ELSEWHERE)


def _exists_already(path: Path) -> InputError:
    return InputError(
        f"{path} exists already",
        "Give another file (-o FILE), or overwrite it with --force (`force=True`).",
    )


def _refuse_system_folders(path: Path) -> None:
    # Not resolved itself: /dev/stdout is a link, often to a file, and the link would be replaced.
    place = path.parent.resolve()
    if place.is_relative_to(_MEMORY_FOLDER):
        return
    if any(place.is_relative_to(folder) for folder in _SYSTEM_FOLDERS):
        raise InputError(f"{path} is no regular file", _ELSEWHERE)


def _check_folder(path: Path) -> None:
    if path.is_symlink():
        raise InputError(
            f"{path} is a symbolic link, and a folder takes the place of a folder alone",
            "Give the folder itself (-o FOLDER).",
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file and no folder", "Give another folder (-o FOLDER).")
    # Replacing a folder deletes it: never one with something in it that we would not write.
    others = [
        file.name
        for file in (path.iterdir() if path.is_dir() else ())
        if file.is_dir() or not file.name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    if others:
        raise InputError(
            f"the folder {path} holds other things than shards: {quoted(sorted(others))}",
            "Give a new folder (-o FOLDER); only a folder of shards is ever replaced.",
        )


@contextmanager
def staged(path: str | Path, *, force: bool = False, folder: bool = False) -> Iterator[Path]:
    """A new name beside ``path``; what stands under it at the end is synced and takes its place.

    When the block raises, nothing is left and the target is as it was.

    Args:
        path: the target.
        force: whether an existing target is replaced.
        folder: stage a folder of files instead of one file. An existing folder is only
            replaced if it holds a sharded state dict and nothing else.

    Raises:
        InputError: the target cannot be written to, or exists without ``force``.
        SurgeryError: writing failed; the target is as it was.
    """
    path = Path(path)
    check_target(path, force=force, folder=folder)
    temporary = path.with_name(f".we_surgery-{secrets.token_hex(6)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        # Remembered for it follows the umask; safetensors gives 0600 to all it writes.
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        # What is private already is so while it is written, too.
        temporary.chmod(mode | (stat.S_IRWXU if folder else stat.S_IRUSR | stat.S_IWUSR))
        yield temporary
        for file in temporary.iterdir() if folder else ():
            _sync(file)
        _sync(temporary)
        temporary.chmod(mode)
        _take_place(temporary, path, force=force, folder=folder)
        _sync(path.parent)
    except WESurgeryError:
        raise
    # Nothing wider: what folds and proves in the block has errors of its own.
    except (OSError, SafetensorError) as error:
        raise SurgeryError(
            f"{path} could not be written: {type(error).__name__}: {error}",
            "Look at the disk's space and permissions; the target is as it was.",
        ) from error
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    logger.info("wrote %s", path)


def _take_place(temporary: Path, path: Path, *, force: bool, folder: bool) -> None:
    # Anything may have come there since the first look: folding takes its time.
    check_target(path, force=force, folder=folder)
    if folder and path.is_dir():
        _swap_folders(temporary, path)
    elif folder or force:
        temporary.replace(path)
    else:
        _take_free_place(temporary, path)


def _take_free_place(temporary: Path, path: Path) -> None:
    """Gives a file a name that nothing has: a rename would replace what came at the last moment."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError as error:
        raise _exists_already(path) from error
    except OSError:
        # Some file systems have no links.
        temporary.rename(path)


def _swap_folders(temporary: Path, path: Path) -> None:
    # No file system swaps two folders by their plain names: the old one steps aside first.
    aside = temporary.with_suffix(".old")
    try:
        path.rename(aside)
        temporary.rename(path)
    finally:
        # By what is there: a signal may come between any two lines.
        if temporary.exists():
            if aside.exists():
                aside.rename(path)
        else:
            shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Makes sure that a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
