"""Opens a file of torch.save without running code from it."""

from __future__ import annotations

import io
import mmap
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from we_surgery._util.imports import working_folder_importable
from we_surgery.checkpoint.safe_pickle.inert import holds_only_weights_aside
from we_surgery.checkpoint.safe_pickle.permissions import (
    PACKED,
    WRAPPERS,
    Refusal,
    Why,
    covers,
    permit,
)
from we_surgery.checkpoint.safe_pickle.recognize import FileKind
from we_surgery.checkpoint.safe_pickle.scan import Actions, scan
from we_surgery.checkpoint.safe_pickle.soundness import refuse_unsound
from we_surgery.errors import InputError, damaged, listed

# Magic number, protocol, system, the object, the keys of its storages.
_LEGACY_PICKLES = 5


def map_tensors(path: Path, kind: FileKind) -> dict[str, Tensor]:
    """The tensors of a state dict in a file of torch.save, each read where it is used."""
    found = unpickle(path, kind, mapped=kind is FileKind.ZIP)
    if not isinstance(found, Mapping):
        raise damaged(f"{path} holds {type(found).__name__} and not a state dict")
    return {key: value.detach() for key, value in found.items() if isinstance(value, Tensor)}


def unpickle(
    path: Path,
    kind: FileKind,
    *,
    allow: Sequence[str] = (),
    trust: bool = False,
    mapped: bool = False,
    content: IO[bytes] | None = None,
) -> Any:
    """The object in a file of torch.save, its tensors on the CPU.

    With ``mapped`` the values of an archive's tensors stay in the file until they are used; writes
    do not reach it. ``content`` is torch.save's output where it is only a part of the file.
    """
    stood_in: list[Refusal] = []
    try:
        opened = path.open("rb") if content is None else nullcontext(content)
        with opened as file, warnings.catch_warnings():
            # The user cannot change the age of the file's content.
            warnings.simplefilter("ignore")
            if trust:
                with working_folder_importable():
                    return torch.load(file, map_location="cpu", weights_only=False)
            safe, stood_in = _safe_globals(path, file, kind, allow)
            file.seek(0)
            # torch maps files by their path alone.
            found = _load_weights_only(str(path) if mapped else file, safe, mapped=mapped)
        refuse_unsound(found, path)
        if stood_in and not holds_only_weights_aside(found):
            raise _refused(path, stood_in, allow)
        return found
    except InputError:
        raise
    # A damaged file can raise anything from inside the unpickler and the classes it refers to.
    except Exception as error:
        if stood_in:
            raise _refused(path, stood_in, allow) from error
        first_line = str(error).strip().partition("\n")[0] or "no further details"
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {first_line}",
            "Save or fetch it again, or save it with the installed versions of its packages.",
        ) from error


def _load_weights_only(place: str | IO[bytes], safe: list[Any], *, mapped: bool) -> Any:
    # Explicitly, because torch 2.8 does not check the indices of sparse tensors otherwise.
    sound: AbstractContextManager[Any] = torch.sparse.check_sparse_tensor_invariants()  # type: ignore[no-untyped-call]
    private: AbstractContextManager[Any] = nullcontext()
    if sys.platform != "win32":  # always private there, and torch refuses to be told
        # Writes to a mapped tensor stay in memory and do not reach the file.
        private = torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)
    with torch.serialization.safe_globals(safe), private, sound:
        return torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)


def _safe_globals(
    path: Path, file: IO[bytes], kind: FileKind, allow: Sequence[str]
) -> tuple[list[Any], list[Refusal]]:
    """The names allowed for ``torch.serialization.safe_globals``, and the stand-ins' refusals."""
    actions = Actions()
    unsafe: set[str] = set()
    for content in _pickles(path, file, kind):
        _scan(path, io.BytesIO(content), actions)
        unsafe |= _unsafe_paths(content)
    permitted = permit(actions, unsafe, allow)
    if permitted.refusals:
        raise _refused(path, permitted.refusals, allow)
    safe = [(found, name) for name, found in permitted.objects.items()]
    if "numpy.dtype" in permitted.objects:
        safe += _number_dtypes()
    # Names that the caller has allowed stay allowed afterwards.
    already = torch.serialization.get_safe_globals()
    return [pair for pair in safe if pair not in already], permitted.stood_in


def _pickles(path: Path, file: IO[bytes], kind: FileKind) -> list[bytes]:
    if kind is FileKind.ZIP:
        # torch's reader, so that both of us read the same record of a doctored archive.
        return [torch._C.PyTorchFileReader(file).get_record("data.pkl")]
    found: list[bytes] = []
    for _ in range(_LEGACY_PICKLES):
        start = file.tell()
        _scan(path, file, Actions())
        size = file.tell() - start
        file.seek(start)
        found.append(file.read(size))
    return found


def _scan(path: Path, stream: IO[bytes], actions: Actions) -> None:
    try:
        scan(stream, actions)
    except ValueError as error:
        if PACKED in actions.names:  # models of FX are written with other instructions too
            raise _refused(path, [Refusal(PACKED, Why.PACKED)], ()) from error
        raise InputError(
            f"{path} cannot be read safely: {error}",
            "Save it again with today's torch.save and its default protocol, or open it with "
            "--trust (`trust=True`), which runs whatever it says, if you trust where it is from.",
        ) from error


def _unsafe_paths(content: bytes) -> set[str]:
    """The names in a pickle that torch does not allow by itself, by torch's own account."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("archive/data.pkl", content)
        writer.writestr("archive/version", "3\n")
    archive.seek(0)
    return set(torch.serialization.get_unsafe_globals_in_checkpoint(archive))


def _number_dtypes() -> list[Any]:
    """The classes of what ``numpy.dtype`` returns for numbers."""
    import numpy

    types = {type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code not in "OSUVMm"}
    return [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in types]


def _refused(path: Path, refusals: Sequence[Refusal], allow: Sequence[str]) -> InputError:
    by_reason: dict[Why, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.why, []).append(refusal.name)
    found = "; ".join(f"{listed(names)} ({why.value})" for why, names in by_reason.items())
    return InputError(f"{path} is refused: it refers to {found}", _hint(refusals, allow))


def _hint(refusals: Sequence[Refusal], allow: Sequence[str]) -> str:
    for refusal in refusals:
        if refusal.name in WRAPPERS:
            return WRAPPERS[refusal.name]
    reasons = {refusal.why for refusal in refusals}
    if Why.MAIN in reasons:
        return (
            "Move the class into a module, import it from there and save again; or give the "
            "model's state_dict with --arch (`architecture=`)."
        )
    if reasons == {Why.NOT_INSTALLED}:
        return "Install the version of the package that saved the file."
    trust = "--trust (`trust=True`) runs whatever the file says"
    packages = [
        refusal.name.partition(".")[0] for refusal in refusals if refusal.why is Why.OTHER_PACKAGE
    ]
    helpful = sorted({p for p in packages if p not in sys.stdlib_module_names})
    if reasons == {Why.OTHER_PACKAGE} and helpful and not covers(allow, helpful[0]):
        options = " ".join(f"--allow {package}" for package in helpful)
        return (
            f"Only if you trust where the file is from: {options} (`allow={helpful}`) admits the "
            f"nn.Module classes of that package; {trust}."
        )
    return f"Only if you trust where the file is from: {trust}."
