"""Importing code that the user named, as a program started in the current folder would."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from we_surgery.errors import InputError, near_matches

REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""``package.module:name``"""


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


def import_for(user: str, name: str) -> ModuleType:
    """Imports a module that ``user``, such as an option, names."""
    try:
        with working_folder_importable():
            return importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"{user}: {name!r} cannot be imported: {type(error).__name__}: {error}",
            "Install its package, or start in the folder that it is in.",
        ) from error


def imported(user: str, reference: str) -> Any:
    """What ``package.module:name`` names, imported from the environment or the current folder."""
    if not REFERENCE.fullmatch(reference):
        raise InputError(
            f"{user} takes package.module:name, not {reference!r}",
            "Write for example my_data:test_loader for a function in my_data.py.",
        )
    module_name, _, name = reference.partition(":")
    module = import_for(user, module_name)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise InputError(
            f"{user}: {module_name} has no {name!r}{near_matches(name, vars(module))}",
            "Correct the name.",
        ) from error
