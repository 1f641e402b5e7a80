"""Two renames that plain ``rename`` does not have: to a free name alone, and of two at once."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_THIS_FOLDER = -100  # AT_FDCWD
_FREE_ALONE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def rename_to_free(source: Path, target: Path) -> None:
    """Gives a file or folder a name that nothing has.

    Where the system has no such rename, a file may keep its old name beside the new one.

    Raises:
        FileExistsError: something has the name.
    """
    if _renamed(source, target, _FREE_ALONE):
        return
    if source.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
        return
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links.
        source.rename(target)


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Lets two files, or two folders, have each other's name.

    At once where the system can. Else ``second`` is at ``aside`` in between; as a file it keeps its
    name too until ``first`` takes it, where there are links.
    """
    if _renamed(first, second, _EXCHANGE):
        return
    try:
        aside.hardlink_to(second)
    except OSError:
        # Folders have no links, and some file systems have none.
        second.rename(aside)
    first.replace(second)
    aside.rename(first)


def _renamed(source: Path, target: Path, flags: int) -> bool:
    """Whether the system could rename so."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_THIS_FOLDER, os.fsencode(source), _THIS_FOLDER, os.fsencode(target), flags):
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
