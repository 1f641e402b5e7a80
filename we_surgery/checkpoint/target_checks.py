"""Whether a file or folder may be written where a user says."""

from __future__ import annotations

import os
from pathlib import Path

from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError

_ELSEWHERE = "Give another file to write (-o FILE)."

# What has a name here is made by the system, and a link among them is no file of the user's.
_SYSTEM_FOLDERS = (Path("/dev"), Path("/proc"), Path("/sys"))
_MEMORY_FOLDER = Path("/dev/shm")


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
            raise exists_already(path)
        folder_exists = path.parent.is_dir()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}", _ELSEWHERE) from error
    if not folder_exists:
        raise InputError(f"there is no folder {path.parent}", "Create it, or give another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder {path.parent} is not writable", _ELSEWHERE)


def exists_already(path: Path) -> InputError:
    """The error for a name that something has."""
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
    if path.is_dir():
        refuse_other_files(path, path)


def refuse_other_files(folder: Path, called: Path) -> None:
    """Raises unless a folder holds shards alone: one that is replaced is deleted.

    Args:
        folder: where it is.
        called: its name for the user.

    Raises:
        InputError: something else is in it.
    """
    others = [
        file.name
        for file in folder.iterdir()
        if file.is_dir() or not file.name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    if others:
        raise InputError(
            f"the folder {called} holds other things than shards: {quoted(sorted(others))}",
            "Give a new folder (-o FOLDER); only a folder of shards is ever replaced.",
        )
