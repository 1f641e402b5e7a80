"""Importing code that the user named, as a program started in the current folder would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """Lets modules in the current folder be imported; installed packages go first."""
    # A console script has its own folder on the path, not the one it is started in.
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
