"""What can go wrong, each with its cause and a hint what to do.

Every error a user can meet carries two sentences: what happened, and what to
do about it. The command line prints them as two lines and ends with the
error's ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class WESurgeryError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        cause: what happened, naming the layer, file or option.
        cure: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause, cure)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.cause}\n{self.cure}"


class InputError(WESurgeryError, ValueError):
    """Bad usage, a bad configuration or an unreadable input; nothing was changed."""

    exit_code = 2


class SurgeryError(WESurgeryError, RuntimeError):
    """The surgery or its verification failed; the model is unchanged."""


class ExcitationError(WESurgeryError, RuntimeError):
    """An excited weight could not be computed or assigned."""


class AttachmentError(WESurgeryError, RuntimeError):
    """A step of the optimizer cannot excite the model's weights; nothing was changed."""


class AlreadyConvertedWarning(UserWarning):
    """``convert`` was called on a converted model."""


class NothingToConvertWarning(UserWarning):
    """``convert`` excited no weight; the model trains as a vanilla one."""


class ThawedLayerWarning(UserWarning):
    """A layer that was frozen or in no optimizer at ``attach`` is trained without excitation."""


class NothingToStripWarning(UserWarning):
    """``strip`` was called on a model or state dict without excitations."""


class NotStrippedWarning(UserWarning):
    """A converted model is exported or traced with its excitations in the graph."""


class PartialLoadWarning(UserWarning):
    """``load_state_dict`` loaded other tensors of an excited layer, but not its weight."""


def near_matches(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """The ``choices`` that look like ``word``, as the end of a sentence ("" when none does)."""
    found = difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.4)
    return f"; did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def check_known(what: str, name: object, known: Iterable[str]) -> str:
    """``name``; an InputError if it is not one of the known ones."""
    known = list(known)
    if name not in known:
        raise InputError(
            f"there is no {what} {name!r}{near_matches(str(name), known)}",
            f"Use one of: {', '.join(known)}.",
        )
    return str(name)


def no_such_file(path: Path) -> InputError:
    """The error for a file that is not there, with the names beside it that look like its own."""
    if path.is_symlink():
        return InputError(
            f"{path} is a symbolic link to {path.readlink()}, which does not exist",
            "Give the file itself, or correct the link.",
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return InputError(
        f"there is no file {path}{near_matches(path.name, beside)}",
        "Check the name; an architecture is written as torchvision:NAME or timm:NAME.",
    )


def damaged(cause: str) -> InputError:
    """The error for a file whose content is inconsistent."""
    return InputError(cause, "Save or download it again.")


def listed(texts: Iterable[str], limit: int = 8) -> str:
    """The texts with commas, the number of those left out, and "none" for none."""
    texts = list(texts)
    more = [f"{len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join([*texts[:limit], *more]) or "none"


def quoted(names: Iterable[object], limit: int = 8) -> str:
    """:func:`listed`, each name in quotes."""
    return listed((repr(str(name)) for name in names), limit)
