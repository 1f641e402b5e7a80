"""A hidden folder beside the targets of a run, for what is being written.

It is locked while its run lives. A run that was killed leaves it there; the next one that writes
beside it removes it.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path

from we_surgery.checkpoint.renaming import rename_to_free

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".we_surgery-", ".tmp"
NEW, OLD = "new", "old"
"""Folders in it: for what is written, and for what is moved aside while two exchange names."""


class HiddenFolder:
    """A new one, beside the file or folder that is going to be written.

    Attributes:
        path: its name.
    """

    def __init__(self, parent: Path) -> None:
        while True:
            self.path = parent / f"{_PREFIX}{secrets.token_hex(6)}{_SUFFIX}"
            self.path.mkdir(mode=stat.S_IRWXU)
            lock, self._descriptor = _locked(self.path)
            # Another run may just have taken it for one that was left.
            if lock is not _Lock.OTHERS and self.path.exists():
                break
            _close(self._descriptor)
        for inner in (NEW, OLD):
            (self.path / inner).mkdir()

    def remove(self) -> None:
        """Removes it and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        _close(self._descriptor)


class _Lock(Enum):
    """Who keeps a hidden folder locked."""

    OURS = "this run"
    OTHERS = "another run or user, or it is gone"
    NONE = "the system has no locks"


def _locked(folder: Path) -> tuple[_Lock, int | None]:
    """Locks a folder as long as this process lives and the descriptor is open."""
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
    """Removes what killed runs left in a folder; what such a run had moved aside comes back."""
    for place in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        lock, descriptor = _locked(place)
        # What cannot be removed is in nobody's way.
        with suppress(OSError):
            if lock is _Lock.OURS:
                for aside in (place / OLD).glob("*"):
                    if not os.path.lexists(parent / aside.name):
                        rename_to_free(aside, parent / aside.name)
                        logger.warning("put %s back, which a killed run had moved", aside.name)
                shutil.rmtree(place)
                logger.warning("removed %s, which a killed run had left", place)
        _close(descriptor)
