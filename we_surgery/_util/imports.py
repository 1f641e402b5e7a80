"""Importing code that the user named, as a program started in the current folder would."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from we_surgery.errors import InputError


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """Lets modules in the current folder be imported; installed packages come first."""
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


def import_package(name: str) -> None:
    """Imports a package for what it registers, such as an excitation of the user's own."""
    try:
        with working_folder_importable():
            importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"the package {name!r} cannot be imported: {type(error).__name__}: {error}",
            "Install it, or start the command in the folder that it is in.",
        ) from error
