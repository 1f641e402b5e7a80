"""Reading: whatever holds a model or weights, opened without running code from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from we_surgery.checkpoint.architecture import Architecture, looks_like_architecture
from we_surgery.checkpoint.attached_runs import find_attached_run
from we_surgery.checkpoint.locating import open_sharded, resolve
from we_surgery.checkpoint.metadata import METADATA_KEY, Metadata
from we_surgery.checkpoint.recognize import FileKind, recognize
from we_surgery.checkpoint.sharded import ShardedStateDict
from we_surgery.checkpoint.unpickle import unpickle
from we_surgery.checkpoint.unwrap import Weights, speaks_of_average, unwrap
from we_surgery.checkpoint.wording import listed
from we_surgery.converted.surgery import PLAN_ATTRIBUTE
from we_surgery.errors import InputError


@dataclass
class Contents:
    """What a file or an architecture's name gives.

    Attributes:
        kind: ``module``, ``state_dict``, ``safetensors``, ``sharded`` for an index of shards,
            ``dcp`` for a folder of torch.distributed.checkpoint, or ``architecture`` for a name
            such as ``torchvision:resnet50``.
        model: for ``module`` and ``architecture``.
        state_dict: for the others, without wrappers and their prefixes, in the file's order.
        sharded: where the values of ``state_dict`` are, if they were left in their files; the
            tensors are of the meta device then.
        metadata: ours, where the file carries it.
        notes: what was chosen and dropped, as sentences.
        path: the file, or None for an architecture.
        is_attached: whether raw weights and excitations are those of an attached run.
    """

    kind: str
    model: nn.Module | None = None
    state_dict: dict[str, Tensor] | None = None
    sharded: ShardedStateDict | None = None
    metadata: Metadata | None = None
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    is_attached: bool = False


def read(
    source: str | Path,
    *,
    key: str | None = None,
    weights: Weights | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
    arguments: Mapping[str, Any] | None = None,
    values: bool = True,
    with_excitation: bool = False,
) -> Contents:
    """Reads a model or weights; tensors come to the CPU.

    What a file is, is told by its content. A pickle is opened by torch's safe unpickler, with
    the ``nn.Module`` classes of torch, torchvision, timm and we_surgery allowed.

    Args:
        source: a file of ``torch.save`` or safetensors, an index of shards, a folder of
            torch.distributed.checkpoint, transformers or accelerate, or an architecture's name.
        key: where in a wrapped checkpoint the state dict is, such as ``state_dict_ema``.
        weights: ``"raw"`` or ``"ema"``: the trained weights or their average, wherever the
            trainer put them, instead of ``key``.
        allow: further packages whose ``nn.Module`` classes a pickle may name; these are
            imported.
        trust: unpickle whatever the file says, which runs its code.
        arguments: keyword arguments of an architecture's factory.
        values: whether to read the values of a state dict that lies in several files.
        with_excitation: of a run with attached excitation, take the raw weights and excitations
            from the optimizer's state: the state dict of the converted form.

    Raises:
        InputError: there is no such file or architecture, it is damaged or none that can be
            read, or it names what it may not name.
    """
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    if isinstance(source, str) and looks_like_architecture(source):
        architecture = Architecture.parse(source, arguments)
        return Contents(
            "architecture",
            model=architecture.build(),
            metadata=Metadata(architecture=architecture),
        )
    files = open_sharded(source)
    path = resolve(Path(source))
    if arguments:
        given = (f"{name}={value!r}" for name, value in arguments.items())
        raise InputError(
            f"arguments were given without an architecture to build: {listed(given)}",
            "Name it (--arch; `architecture=`).",
        )
    if files is not None:
        sharded = files.state_dict(key, weights)
        contents = Contents(files.kind, state_dict=sharded.tensors, notes=sharded.notes, path=path)
        if values:
            return replace(contents, state_dict=sharded.load())
        return replace(contents, sharded=sharded)
    kind = recognize(path)
    if kind is FileKind.SAFETENSORS:
        return _read_safetensors(path, key, weights)
    found = unpickle(path, kind, allow=allow, trust=trust)
    if isinstance(found, nn.Module):
        return _from_module(found, path, key or weights)
    if isinstance(found, Mapping):
        return _from_mapping(found, path, key, weights, with_excitation=with_excitation)
    raise InputError(
        f"{path} holds no model and no weights but {type(found).__name__}",
        "Give a file that holds a model or its state dict.",
    )


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
    run = None
    is_average = weights == "ema" or (key is not None and speaks_of_average(key))
    try:
        if METADATA_KEY in found:
            metadata = Metadata.from_dict(found[METADATA_KEY], "the file")
        state, notes = unwrap(found, key, weights)
        if with_excitation and not is_average:
            run = find_attached_run(found, state)
        if run is not None:
            state = run.converted(state)
            metadata = metadata or Metadata(plan=run.plan.to_dict())
            notes.append(
                f"excitation attached to the optimizer, after {run.steps} steps; the model's "
                "weights are the excited ones, ready to deploy"
            )
    except InputError as error:
        raise InputError(f"{path}: {error.cause}", error.cure) from error
    # A doctored file can give a mapping attributes that hide its methods.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {error}", "Save or fetch it again."
        ) from error
    if metadata is not None and key is None:
        notes = [note for note in notes if note != "used 'state_dict'"]
    return Contents(
        "state_dict",
        state_dict=state,
        metadata=metadata,
        notes=notes,
        path=path,
        is_attached=run is not None,
    )


def _read_safetensors(path: Path, key: str | None, weights: Weights | None) -> Contents:
    from safetensors import SafetensorError, safe_open

    if key is not None:
        raise InputError(
            f"{path} is a safetensors file, which has no key {key!r} around its tensors",
            "Leave out --key (`key=`).",
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is a damaged or cut short safetensors file: {error}",
            "Save or fetch it again.",
        ) from error
    if not tensors:
        raise InputError(f"{path} holds no tensors", "Save or fetch it again.")
    # `safetensors.torch.save_model` writes a shared tensor once, and here where else it belongs.
    shared = {name: kept for name, kept in header.items() if kept in tensors}
    tensors |= {name: tensors[kept] for name, kept in shared.items() if name not in tensors}
    metadata = None
    if METADATA_KEY in header:
        metadata = Metadata.from_json(header[METADATA_KEY], str(path))
    try:
        state, notes = unwrap(tensors, None, weights)
    except InputError as error:
        raise InputError(f"{path}: {error.cause}", error.cure) from error
    return Contents("safetensors", state_dict=state, metadata=metadata, notes=notes, path=path)
