"""Reads any file that holds a model or weights, without running code from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from we_surgery.checkpoint.architecture import Architecture, looks_like_architecture
from we_surgery.checkpoint.attached_runs import RUN_OBJECTS, AttachedRun, find_attached_run
from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.safe_pickle.unpickle import unpickle
from we_surgery.checkpoint.shards import open_files, resolve
from we_surgery.checkpoint.shards.files import StateDict, TensorFiles
from we_surgery.checkpoint.unwrap import Weights, speaks_of_average, unwrap
from we_surgery.converted.state import PLAN_ATTRIBUTE
from we_surgery.errors import InputError, damaged, listed


@dataclass
class Contents:
    """What a file or an architecture's name gives: a model or weights.

    The kind is ``module``, ``state_dict``, ``safetensors``, ``sharded`` (an index of shards),
    ``dcp`` (torch.distributed.checkpoint) or ``architecture``. The weights have no wrappers and
    prefixes. ``is_attached`` says that raw weights and excitations are those of an attached run.
    """

    kind: str
    model: nn.Module | None = None
    weights: StateDict | None = None
    metadata: Metadata | None = None
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    is_attached: bool = False

    @cached_property
    def state_dict(self) -> dict[str, Tensor] | None:
        """The weights with their values in memory."""
        return None if self.weights is None else self.weights.load()


def read(
    source: str | Path,
    *,
    key: str | None = None,
    weights: Weights | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
    arguments: Mapping[str, Any] | None = None,
    with_excitation: bool = False,
) -> Contents:
    """Reads a model or weights; tensors come to the CPU, those of several files when asked for.

    The format of a file is told by its content. ``key``, ``allow`` and ``trust`` are as in
    :func:`~we_surgery.load`, ``weights`` as in :func:`~we_surgery.strip_state_dict`; ``arguments``
    are those of an architecture's factory. Of an attached run ``with_excitation`` takes raw weights
    and excitations from the optimizer's state: the state dict of the converted form.
    """
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    if isinstance(source, str) and looks_like_architecture(source):
        architecture = Architecture.parse(source, arguments)
        model = architecture.build()
        metadata = Metadata(architecture=architecture)
        return Contents("architecture", model=model, metadata=metadata)
    path = resolve(Path(source))
    files = open_files(path)
    if arguments:
        given = (f"{name}={value!r}" for name, value in arguments.items())
        raise InputError(
            f"arguments of an architecture were given ({listed(given)}), but no architecture",
            "Name it (--arch; `architecture=`).",
        )
    if isinstance(files, TensorFiles):
        return _from_files(files, key, weights, with_excitation=with_excitation)
    found = unpickle(path, files, allow=allow, trust=trust)
    if isinstance(found, nn.Module):
        return _from_module(found, path, key or weights)
    if isinstance(found, Mapping):
        return _from_mapping(found, path, key, weights, with_excitation=with_excitation)
    raise InputError(
        f"{path} holds {type(found).__name__} and not a model or weights",
        "Give a file that holds a model or its state dict.",
    )


def _from_files(
    files: TensorFiles, key: str | None, weights: Weights | None, *, with_excitation: bool
) -> Contents:
    if files.kind == "safetensors" and key is not None:
        raise InputError(
            f"{files.path} is a safetensors file, whose tensors are not nested under a key {key!r}",
            "Leave out --key (`key=`).",
        )
    with _errors_named(files.path):
        saved = files.checkpoint(RUN_OBJECTS if with_excitation else ())
        state, notes, run = _unwrapped(saved, key, weights, with_excitation=with_excitation)
        found = files.located(state, notes)
    return Contents(
        files.kind,
        weights=found,
        metadata=files.metadata or _metadata_of(run),
        notes=found.notes,
        path=files.path,
        is_attached=run is not None,
    )


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Adds the file's name to errors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error.cause}", error.cure) from error
    # A doctored file can hold anything anywhere, and give a mapping attributes that hide its
    # methods.
    except Exception as error:
        raise damaged(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _unwrapped(
    saved: Mapping[str, Any], key: str | None, weights: Weights | None, *, with_excitation: bool
) -> tuple[dict[str, Tensor], list[str], AttachedRun | None]:
    """The state dict in a trainer's checkpoint, and its attached run."""
    state, notes = unwrap(saved, key, weights)
    is_average = weights == "ema" or (key is not None and speaks_of_average(key))
    run = find_attached_run(saved, state) if with_excitation and not is_average else None
    if run is None:
        return state, notes, None
    return run.converted(state), [*notes, run.note], run


def _metadata_of(run: AttachedRun | None) -> Metadata | None:
    return None if run is None else Metadata(plan=run.plan.to_dict())


def _from_module(model: nn.Module, path: Path, key: str | None) -> Contents:
    if key is not None:
        raise InputError(
            f"{path} holds a whole model, which has no key {key!r}",
            "Leave out --key (`key=`), --raw and --ema (`weights=`).",
        )
    notes = []
    if type(model) is nn.DataParallel:
        inner = model._modules.get("module")
        if inner is None:
            raise InputError(
                f"{path} holds a DataParallel wrapper without a model in it",
                "Save the model inside it: `torch.save(model.module, ...)`.",
            )
        model = inner
        notes.append("used the model inside its DataParallel wrapper")
    plan = model.__dict__.get(PLAN_ATTRIBUTE)
    metadata = Metadata(plan=plan) if isinstance(plan, Mapping) else None
    return Contents("module", model=model, metadata=metadata, notes=notes, path=path)


def _from_mapping(
    found: Mapping[str, Any],
    path: Path,
    key: str | None,
    weights: Weights | None,
    *,
    with_excitation: bool,
) -> Contents:
    metadata = None
    with _errors_named(path):
        if METADATA_KEY in found:
            metadata = Metadata.from_dict(found[METADATA_KEY], "the file")
        state, notes, run = _unwrapped(found, key, weights, with_excitation=with_excitation)
        if metadata is not None and key is None:
            notes = [note for note in notes if note != "used 'state_dict'"]
    return Contents(
        "state_dict",
        weights=StateDict(state, notes),
        metadata=metadata or _metadata_of(run),
        notes=notes,
        path=path,
        is_attached=run is not None,
    )
