"""Files are written in a hidden folder beside their targets, and moved to them all or none."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from we_surgery.errors import InputError, SurgeryError, WESurgeryError, listed, quoted

logger = logging.getLogger(__name__)

_ELSEWHERE = "Give another file to write (-o FILE)."
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
        place = _behind_links(path)
        exists = os.path.lexists(place)
        if folder and exists and not place.is_dir():
            raise InputError(f"{path} is a file, not a folder", "Give another folder (-o FOLDER).")
        if folder and exists:
            _refuse_lost_files(place, path, others)
        elif place.is_dir():
            raise InputError(f"{path} is a folder", _ELSEWHERE)
        elif exists and not place.is_file():
            raise InputError(f"{path} is not a regular file", _ELSEWHERE)
        if exists and not force:
            raise _exists_already(path)
        folder_exists = place.parent.is_dir()
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last of a loop of links
        raise InputError(f"{path} cannot be written: {error}", _ELSEWHERE) from error
    if not folder_exists:
        raise InputError(f"there is no folder {place.parent}", "Create it, or give another file.")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder {place.parent} is not writable", _ELSEWHERE)


def _behind_links(path: Path) -> Path:
    """Where to write: a link stays, and what it names is replaced, as by cp and most tools."""
    return path.resolve() if path.is_symlink() else path


def _exists_already(path: Path) -> InputError:
    return InputError(
        f"{path} exists already",
        "Give another file (-o FILE), or overwrite it with --force (`force=True`).",
    )


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
    """One file or folder that will take its place.

    ``identity`` is of what was written, by which it is known under any name.
    """

    path: Path
    hidden: Path
    force: bool
    folder: bool
    others: Collection[str]
    mode: int = 0
    identity: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.target = _behind_links(self.path)
        self.new = self.hidden / self.target.name
        self.old = self.hidden / f"{self.target.name}.old"

    def check(self) -> None:
        check_target(self.path, force=self.force, folder=self.folder, others=self.others)

    def finish(self) -> None:
        """Syncs the written file to the disk and sets its permissions."""
        for path in (*self.new.rglob("*"), self.new) if self.folder else (self.new,):
            (_sync_folder if path.is_dir() else sync)(path)
        self.new.chmod(self.mode)
        # Not before: a writer may have put another file under the name.
        self.identity = _identity(self.new)

    def take_place(self) -> None:
        """Moves what stands at the target aside, and the written file there."""
        if self.force:
            # A file keeps its name until the new one takes it, a folder not.
            if os.path.lexists(self.target) and not _linked(self.target, self.old):
                self.target.rename(self.old)
            self.new.replace(self.target)
            if self.folder and self.old.exists():
                # What came at the last moment is not deleted either.
                _refuse_lost_files(self.old, self.path, self.others)
            return
        try:
            if _linked(self.new, self.target):
                return
        except FileExistsError as error:
            raise _exists_already(self.path) from error
        if os.path.lexists(self.target):
            raise _exists_already(self.path)
        self.new.rename(self.target)

    def give_back(self) -> None:
        """Undoes :meth:`take_place`, also a partial one."""
        if self.identity is not None and _identity(self.target) == self.identity:
            if os.path.lexists(self.new):
                self.target.unlink()
            else:
                self.target.rename(self.new)
        if not os.path.lexists(self.old):
            return
        if not os.path.lexists(self.target):
            self.old.rename(self.target)
        elif _identity(self.target) != _identity(self.old):
            raise FileExistsError(f"something else stands at {self.target}")


class Staging:
    """Targets that are written together; see :func:`staged_together`."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._staged: list[_Staged] = []
        self._hidden: list[Path] = []

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

        A target that is replaced keeps its permissions; of a new one, who cannot read ``like``, the
        source, cannot read it. A folder is only replaced if it holds a sharded state dict and
        ``others``, the files that the new one will hold beside shards.
        """
        path = Path(path)
        self.paths.append(str(path))
        check_target(path, force=force, folder=folder, others=others)
        parent = _behind_links(path).parent
        self._hidden.append(
            Path(tempfile.mkdtemp(prefix=".we_surgery-", suffix=".tmp", dir=parent))
        )
        staged = _Staged(path, self._hidden[-1], force, folder, others)
        if folder:
            staged.new.mkdir()
        else:
            staged.new.touch(exist_ok=False)
        # Taken now, for it follows the umask; safetensors gives 0600 to all it writes.
        staged.mode = _mode(staged.new, staged.target, like)
        self._staged.append(staged)
        return staged.new

    def take_places(self) -> None:
        """Moves all written files to their targets, or none."""
        for staged in self._staged:
            staged.finish()
        for staged in self._staged:
            staged.check()  # anything may have come there since the first look
        try:
            for staged in self._staged:
                staged.take_place()
        except BaseException as error:
            self._give_back(error)
            raise
        for staged in self._staged:
            _sync_folder(staged.target.parent)
            logger.info("wrote %s", staged.path)

    def close(self) -> None:
        """Removes leftover files beside the targets."""
        for hidden in self._hidden:
            shutil.rmtree(hidden, ignore_errors=True)

    def _give_back(self, error: BaseException) -> None:
        stuck: list[str] = []
        for staged in reversed(self._staged):
            try:
                staged.give_back()
            except OSError:
                stuck.append(str(staged.path))
        if stuck:
            self._hidden.clear()  # what stood there may be in them
            raise SurgeryError(
                f"{listed(self.paths)} could not be written: {error}; after that "
                f"{listed(stuck)} could not be put back as it was",
                "Look at the disk, at these files, and into the hidden folders .we_surgery-*.tmp "
                "beside them.",
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


def _identity(path: Path) -> tuple[int, int] | None:
    if not os.path.lexists(path):
        return None
    found = path.lstat()
    return found.st_dev, found.st_ino


def _linked(path: Path, name: Path) -> bool:
    """Gives a file a second name; False for folders, and where the file system has no links."""
    try:
        name.hardlink_to(path)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Syncs a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # network mounts keep the names in another way, and refuse
            sync(folder, os.O_RDONLY)
