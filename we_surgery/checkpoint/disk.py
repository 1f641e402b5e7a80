"""Syncs, safe renames, and a hidden folder for unfinished files."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
import stat
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_THIS_FOLDER = -100  # AT_FDCWD
_FREE_ALONE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE
_NO_SUCH_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

# Errors of file systems that keep the names in a folder in another way.
_NO_FOLDER_SYNC = _NO_SUCH_RENAME | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}

_PREFIX, _SUFFIX = ".we_surgery-", ".tmp"
NEW, OLD = "new", "old"
"""Folders in a hidden folder: for what is written, and for what is moved aside meanwhile."""


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Syncs a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """:func:`sync` of a folder, where the system supports it."""
    if sys.platform == "win32":
        return
    try:
        sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        logger.debug("%s cannot be synced: %s", folder, error)


def rename_to_free(source: Path, target: Path) -> None:
    """Renames, or raises FileExistsError if the new name is taken.

    On systems without such a rename, a file may keep its old name too.
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
    except OSError:  # Some file systems have no links.
        source.rename(target)


def exchange(first: Path, second: Path, aside: Path) -> None:
    """Swaps the names of two files or two folders.

    In one step if the system supports it. Otherwise ``second`` is at ``aside`` in between; a file
    also keeps its name until ``first`` takes it, if the file system has links.
    """
    if _renamed(first, second, _EXCHANGE):
        return
    try:
        aside.hardlink_to(second)
    except OSError:  # Folders have no links, and neither have some file systems.
        second.rename(aside)
    first.replace(second)
    aside.rename(first)


def _renamed(source: Path, target: Path, flags: int) -> bool:
    """Renames with flags of Linux; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_THIS_FOLDER, os.fsencode(source), _THIS_FOLDER, os.fsencode(target), flags):
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_RENAME:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


class HiddenFolder:
    """A new hidden folder in ``parent``, locked during this run.

    A killed run leaves it; the next run that writes there removes it.
    """

    def __init__(self, parent: Path) -> None:
        while True:
            self.path = parent / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
            self.path.mkdir(mode=stat.S_IRWXU)
            lock, self._descriptor = _locked(self.path)
            # Another run may have removed it as a leftover.
            if lock is not _Lock.OTHERS and self.path.exists():
                break
            _close(self._descriptor)
        for inner in (NEW, OLD):
            (self.path / inner).mkdir()

    def remove(self) -> None:
        """Removes it and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        _close(self._descriptor)


class _Lock(Enum):
    OURS = "this run"
    OTHERS = "another run or user, or the folder is gone"
    NONE = "the system has no locks"


def _locked(folder: Path) -> tuple[_Lock, int | None]:
    """The holder of a hidden folder's lock, and the descriptor of our own lock."""
    if sys.platform == "win32":
        return _Lock.NONE, None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return _Lock.OTHERS, None
    if os.fstat(descriptor).st_uid != os.geteuid():
        return _Lock.OTHERS, descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.OTHERS, descriptor
    except OSError:
        return _Lock.NONE, descriptor
    return _Lock.OURS, descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def remove_left_over(parent: Path) -> None:
    """Removes leftovers of killed runs in a folder, and restores files that they moved aside."""
    for place in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        lock, descriptor = _locked(place)
        # A leftover that cannot be removed does no harm.
        with suppress(OSError):
            if lock is _Lock.OURS:
                for aside in (place / OLD).glob("*"):
                    if not os.path.lexists(parent / aside.name):
                        rename_to_free(aside, parent / aside.name)
                        logger.warning("put %s back, which a killed run had moved", aside.name)
                shutil.rmtree(place)
                logger.warning("removed %s, which a killed run had left", place)
        _close(descriptor)
