"""Files are written in a hidden folder beside their targets, and moved to them all or none."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from we_surgery.checkpoint.disk import (
    NEW,
    OLD,
    HiddenFolder,
    exchange,
    remove_left_over,
    rename_to_free,
    sync,
    sync_folder,
)
from we_surgery.errors import InputError, SurgeryError, WESurgeryError, listed, quoted

logger = logging.getLogger(__name__)

_ELSEWHERE = "Give another file to write (-o FILE)."

# The system makes what has a name here; a link in these folders is not a file of the user's.
_SYSTEM_FOLDERS = (Path("/dev"), Path("/proc"), Path("/sys"))
_MEMORY_FOLDER = Path("/dev/shm")
_SHARDS = (".safetensors", ".safetensors.index.json")


def check_target(
    path: str | Path,
    *,
    force: bool = False,
    folder: bool = False,
    others: Collection[str] = (),
) -> None:
    """Raises InputError if a file, or a folder of shards, cannot be written at ``path``.

    The names of ``others`` are of files, beside shards, that the folder will hold.
    """
    path = Path(path)
    try:
        _refuse_system_folders(path)
        if folder:
            _check_folder(path, others)
        elif path.is_dir():
            raise InputError(f"{path} is a folder", _ELSEWHERE)
        elif path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file", _ELSEWHERE)
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
    # The path itself is not resolved: /dev/stdout is a link, and the link would be replaced.
    place = path.parent.resolve()
    if place.is_relative_to(_MEMORY_FOLDER):
        return
    if any(place.is_relative_to(folder) for folder in _SYSTEM_FOLDERS):
        raise InputError(f"{path} is not a regular file", _ELSEWHERE)


def _check_folder(path: Path, others: Collection[str]) -> None:
    if path.is_symlink():
        raise InputError(
            f"{path} is a symbolic link, and only a folder can be replaced by a folder",
            "Give the folder itself (-o FOLDER).",
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder", "Give another folder (-o FOLDER).")
    if path.is_dir():
        _refuse_lost_files(path, path, others)


def _refuse_lost_files(folder: Path, called: Path, others: Collection[str]) -> None:
    """Raises if a folder holds files that the new one will not, since it will be deleted."""
    lost = [
        name
        for file in folder.rglob("*")
        if not file.is_dir() or file.is_symlink() or not any(file.iterdir())
        if (name := file.relative_to(folder).as_posix()) not in others
        and not ("/" not in name and name.endswith(_SHARDS))
    ]
    if lost:
        raise InputError(
            f"replacing the folder {called} would delete files that the new one does not have: "
            f"{quoted(sorted(lost))}",
            "Give a new folder (-o FOLDER), or move these files.",
        )


@dataclass
class _Staged:
    """One file or folder that is to take its place.

    ``identity`` is of what was written, by which it is known under any name.
    """

    path: Path
    place: Path
    force: bool
    folder: bool
    others: Collection[str]
    mode: int = 0
    identity: tuple[int, int] = (0, 0)

    @property
    def new(self) -> Path:
        """Where it is written, and where the replaced file ends up."""
        return self.place / NEW / self.path.name

    @property
    def old(self) -> Path:
        """Where the replaced file lies during the exchange."""
        return self.place / OLD / self.path.name

    def finish(self) -> None:
        """Syncs the written file to the disk and sets its permissions."""
        for path in (*self.new.rglob("*"), self.new) if self.folder else (self.new,):
            (sync_folder if path.is_dir() else sync)(path)
        self.new.chmod(self.mode)
        # Not before: a writer may have put another file under the name.
        self.identity = _identity(self.new)

    def take_place(self) -> None:
        """Exchanges the written file and the target."""
        try:
            rename_to_free(self.new, self.path)
        except FileExistsError as error:
            if not self.force:
                raise _exists_already(self.path) from error
            exchange(self.new, self.path, self.old)
            if self.folder:
                # What came at the last moment is not deleted either.
                _refuse_lost_files(self.new, self.path, self.others)

    def give_back(self) -> None:
        """Undoes :meth:`take_place`, also a partial one."""
        is_there = os.path.lexists(self.path)
        is_ours = is_there and _identity(self.path) == self.identity
        if os.path.lexists(self.old):
            if is_ours:
                self.path.rename(self.new)
            if is_ours or not is_there:
                self.old.rename(self.path)
        elif is_ours and os.path.lexists(self.new):
            if _identity(self.new) == self.identity:
                self.path.unlink()
            else:
                exchange(self.new, self.path, self.old)
        elif is_ours:
            self.path.rename(self.new)


class Staging:
    """Targets that are written together; see :func:`staged_together`."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._staged: list[_Staged] = []
        self._places: list[HiddenFolder] = []

    def add(
        self,
        path: str | Path,
        *,
        force: bool = False,
        folder: bool = False,
        others: Collection[str] = (),
        like: Path | None = None,
    ) -> Path:
        """A name to write one of the targets to.

        Args:
            path: the target.
            force: replace an existing target, which keeps its permissions.
            folder: stage a folder of files instead of one file. An existing folder is only
                replaced if it holds a sharded state dict and ``others``.
            others: the files that the folder will hold beside shards, relative to it.
            like: the source. Who cannot read it cannot read a new target.
        """
        path = Path(path)
        self.paths.append(str(path))
        check_target(path, force=force, folder=folder, others=others)
        remove_left_over(path.parent)
        self._places.append(HiddenFolder(path.parent))
        staged = _Staged(path, self._places[-1].path, force, folder, others)
        if folder:
            staged.new.mkdir()
        else:
            staged.new.touch(exist_ok=False)
        # Taken now, for it follows the umask; safetensors gives 0600 to all it writes.
        staged.mode = _mode(staged.new, path, like)
        self._staged.append(staged)
        return staged.new

    def take_places(self) -> None:
        """Renames all written files to their targets, or none."""
        for staged in self._staged:
            staged.finish()
        for staged in self._staged:
            # Anything may have come there since the first look: folding takes its time.
            check_target(
                staged.path, force=staged.force, folder=staged.folder, others=staged.others
            )
        try:
            for staged in self._staged:
                staged.take_place()
        except BaseException as error:
            self._give_back(error)
            raise
        _sync_names([staged.path for staged in self._staged])
        for staged in self._staged:
            logger.info("wrote %s", staged.path)

    def close(self) -> None:
        """Removes leftover files beside the targets."""
        for place in self._places:
            place.remove()
        self._places.clear()

    def _give_back(self, error: BaseException) -> None:
        stuck: list[str] = []
        for staged in reversed(self._staged):
            try:
                staged.give_back()
            except OSError:
                stuck.append(str(staged.path))
        if stuck:
            raise SurgeryError(
                f"{listed(self.paths)} could not be written: {error}; after that "
                f"{listed(stuck)} could not be put back as it was",
                "Look at the disk, and at these files: they may be new or missing.",
            ) from error


@contextmanager
def staged_together() -> Iterator[Staging]:
    """New names beside targets; what stands under them at the end is synced and takes its place.

    When the block raises, or one of them cannot take its place, nothing is left and the targets are
    as they were.
    """
    stage = Staging()
    try:
        yield stage
        stage.take_places()
    except WESurgeryError:
        raise
    # Nothing wider: what folds and proves in the block has errors of its own.
    except (OSError, SafetensorError) as error:
        single = len(stage.paths) < 2
        raise SurgeryError(
            f"{listed(stage.paths)} could not be written: {type(error).__name__}: {error}",
            "Look at the disk's space and permissions; "
            f"{'the target is as it was' if single else 'the targets are as they were'}.",
        ) from error
    finally:
        stage.close()


@contextmanager
def staged(
    path: str | Path, *, force: bool = False, folder: bool = False, like: Path | None = None
) -> Iterator[Path]:
    """:func:`staged_together` for one target, with the arguments of :meth:`Staging.add`."""
    with staged_together() as stage:
        yield stage.add(path, force=force, folder=folder, like=like)


def _mode(made: Path, target: Path, like: Path | None) -> int:
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mode = stat.S_IMODE(made.stat().st_mode)
    if like is not None and like.exists():
        readable = like.stat().st_mode
        for bit, all_bits in ((stat.S_IRGRP, stat.S_IRWXG), (stat.S_IROTH, stat.S_IRWXO)):
            mode &= ~(0 if readable & bit else all_bits)
    return mode


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _sync_names(paths: list[Path]) -> None:
    """Syncs the new names to the disk."""
    try:
        for parent in dict.fromkeys(path.parent for path in paths):
            sync_folder(parent)
    except OSError as error:
        raise SurgeryError(
            f"{listed(map(str, paths))}: written and in place, but the disk failed to note the "
            f"names: {error}",
            "Look at the disk; the new files may be gone after a power failure.",
        ) from error
