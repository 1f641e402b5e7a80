"""Files and folders put on the disk before anybody is told that they are there."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

# What file systems say that keep the names in a folder in another way.
_NO_FOLDER_SYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
}


def sync_folder(folder: Path) -> None:
    """:func:`sync` of a folder, where the system can."""
    if sys.platform == "win32":
        return  # It cannot open a folder.
    try:
        sync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        logger.debug("%s cannot be synced: %s", folder, error)


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Makes sure that a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
