"""Saves a model in one file, and loads it."""

from __future__ import annotations

import shlex
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.checkpoint import transformers_folder
from we_surgery.checkpoint.architecture import FORMS, Architecture
from we_surgery.checkpoint.contents import Contents, read
from we_surgery.checkpoint.excited_entry import (
    ExcitedEntry,
    find_excited,
    is_excited_state_dict,
)
from we_surgery.checkpoint.metadata import Metadata
from we_surgery.checkpoint.plan_check import check_plan
from we_surgery.checkpoint.quantized import is_quantized
from we_surgery.checkpoint.unwrap import VERSIONS, with_versions
from we_surgery.checkpoint.writing import write
from we_surgery.converted.excite import ExcitationSite, excite
from we_surgery.converted.state import PLAN_ATTRIBUTE, refuse_wrappers
from we_surgery.errors import InputError, near_matches, quoted
from we_surgery.excitations import Composition
from we_surgery.planning.transplant_rows import attach

_FIT = (
    "Give the architecture and the arguments it was trained with (--arch, --arch-arg "
    "num_classes=10; in Python, `Architecture.parse`)."
)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str | Architecture | None = None,
    force: bool = False,
) -> None:
    """Writes a model, converted or not, so that :func:`load` opens it.

    Args:
        model: the model.
        path: ``.safetensors`` gives a safetensors file. Any other extension gives a pickled
            module, or with an architecture a state dict that describes itself.
        architecture: what builds the vanilla model, such as ``timm:mixer_s16_224``; kept in the
            file for :func:`load`.
        force: overwrite an existing file.

    Raises:
        InputError: the model is wrapped or sharded, the architecture has another form, the
            target cannot be written to, or it exists without ``force``.
        SurgeryError: writing failed; the target is as it was.
    """
    refuse_wrappers(model)
    path = Path(path)
    if isinstance(architecture, str):
        architecture = Architecture.parse(architecture)
    metadata = Metadata(plan=model.__dict__.get(PLAN_ATTRIBUTE), architecture=architecture)
    if path.suffix == ".safetensors":
        write(_tensors(model), path, "safetensors", metadata=metadata, force=force)
    elif architecture is None:
        write(model, path, "module", force=force)
    else:
        write(_tensors(model), path, "state_dict", metadata=metadata, force=force)


def load(
    path: str | Path,
    *,
    architecture: str | Architecture | None = None,
    key: str | None = None,
    allow: Sequence[str] = (),
    trust: bool = False,
) -> nn.Module:
    """Loads a model, converted or vanilla, from a file without running code from it.

    A pickled module is returned as it was saved. A state dict is loaded strictly into the
    architecture of the argument, else of the file. The model is then in train mode, on the CPU, in
    the file's dtypes, with the excitations that the file's keys record.

    Args:
        path: a file of ``torch.save`` or safetensors.
        architecture: what builds the vanilla model, for a file that holds weights.
        key: as in :func:`~we_surgery.checkpoint.read`.
        allow: as there; also packages whose factories a file may name as its architecture.
        trust: as there.

    Raises:
        InputError: the file cannot be read or is refused, no architecture is known, or the
            weights do not fit it.
    """
    contents = read(path, key=key, allow=allow, trust=trust)
    check_plan(contents)
    return model_from(contents, architecture=architecture, allow=allow)


def model_from(
    contents: Contents,
    *,
    architecture: str | Architecture | None = None,
    allow: Sequence[str] = (),
) -> nn.Module:
    """The model of what :func:`~we_surgery.checkpoint.read` returned; see :func:`load`."""
    if contents.model is not None:
        return contents.model
    state = contents.state_dict
    assert state is not None
    if isinstance(architecture, str):
        architecture = Architecture.parse(architecture)
    if architecture is None and contents.metadata is not None:
        architecture = contents.metadata.architecture
    if architecture is None:
        raise InputError(
            f"{contents.path} holds weights but does not name their architecture",
            f"Name it with --arch (`architecture=`): {_forms_for(contents.path)}.",
        )
    # The weights drawn here are replaced, so the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        model = architecture.build((allow,) if isinstance(allow, str) else tuple(allow))
        plan = None if contents.metadata is None else contents.metadata.stored_plan
        if plan is not None:
            attach(model, plan.transplants, loading=True)
    if architecture.names_folder and not is_excited_state_dict(state):
        state, unused = transformers_folder.named_as_in(model, state)
        if unused:
            contents.notes.append(f"left out {quoted(unused)}, which {architecture.name} lacks")
    _fill(model, state, architecture)
    if plan is not None:
        model.__dict__[PLAN_ATTRIBUTE] = plan.to_dict()
    return model


def _forms_for(path: Path | None) -> str:
    if path is not None and (path.parent / "config.json").is_file():
        folder = shlex.quote(f"transformers:{path.parent}")
        return f"{folder} if transformers wrote this folder, else {FORMS}"
    return FORMS


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"the state dict of the model holds {others[0]!r}, which is not a tensor",
            "Save the whole module: a file without .safetensors, and no architecture.",
        )
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], architecture: Architecture) -> None:
    """Excites a vanilla model as ``state`` says, and loads ``state`` into it."""
    entries = list(find_excited(state))
    _match_dtypes(model, state, entries)
    excite(model, _sites(model, entries, architecture))
    _match_layouts(model, state)
    versions = getattr(model.state_dict(), VERSIONS, None)
    if not hasattr(state, VERSIONS) and versions and state.keys() == model.state_dict().keys():
        # With these very keys it is of the current version, whatever the file left unsaid.
        state = with_versions(state, versions)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        raise _misfit(model, state, architecture, error) from error


def _match_dtypes(
    model: nn.Module, state: Mapping[str, Tensor], entries: Sequence[ExcitedEntry]
) -> None:
    """Casts the model, with buffers that the file lacks, if all its weights have one dtype."""
    kept = {entry.excitation_prefix + key for entry in entries for key in entry.excitation}
    dtypes = {
        value.dtype for key, value in state.items() if key not in kept and value.is_floating_point()
    }
    if len(dtypes) == 1:
        model.to(dtypes.pop())


def _match_layouts(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives each parameter and buffer the dtype and memory format it has in the file.

    Copying into a tensor keeps that tensor's own; assigning tensors would untie tied ones.
    """
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        value = state.get(name)
        if value is None or value.shape != tensor.shape:
            continue
        # An index that a script cast along with the weights stays an index here.
        both_float = value.is_floating_point() and tensor.is_floating_point()
        dtype = value.dtype if both_float else tensor.dtype
        if (dtype, value.stride()) != (tensor.dtype, tensor.stride()):
            tensor.data = torch.empty_like(value, dtype=dtype, device=tensor.device)


def _sites(
    model: nn.Module, entries: Sequence[ExcitedEntry], architecture: Architecture
) -> list[ExcitationSite]:
    modules = dict(model.named_modules(remove_duplicate=False))
    by_parameter: dict[int, tuple[ExcitedEntry, Composition]] = {}
    sites: list[ExcitationSite] = []
    taken: set[tuple[int, str]] = set()
    parts: dict[Hashable, nn.Module] = {}
    for entry in entries:
        owner = modules.get(entry.layer)
        parameter = None if owner is None else owner._parameters.get(entry.parameter)
        if parameter is None or parameter.shape != entry.raw.shape:
            raise _no_such_weight(model, entry, architecture, exists=parameter is not None)
        if id(parameter) in by_parameter:
            first, excitation = by_parameter[id(parameter)]
            _refuse_different(first, entry)
        else:
            excitation = _owned(entry.rebuild())
            excitation.share(parts)
            by_parameter[id(parameter)] = (entry, excitation)
        # A module that goes by two names has its entries under both.
        if (id(owner), entry.parameter) not in taken:
            sites.append(ExcitationSite(entry.layer, entry.parameter, excitation))
            taken.add((id(owner), entry.parameter))
    return sites


def _no_such_weight(
    model: nn.Module, entry: ExcitedEntry, architecture: Architecture, *, exists: bool
) -> InputError:
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    has = "another shape" if exists else "no such weight" + near_matches(entry.vanilla_key, known)
    return InputError(
        f"the file excites {entry.vanilla_key!r} {tuple(entry.raw.shape)}, but "
        f"{architecture.name} has {has}",
        _FIT,
    )


def _owned(excitation: Composition) -> Composition:
    """The excitation in memory of its own, so that training it leaves the read file alone."""
    for tensor in (*excitation.parameters(), *excitation.buffers()):
        tensor.data = tensor.data.clone()
    return excitation


def _refuse_different(first: ExcitedEntry, second: ExcitedEntry) -> None:
    same = torch.equal(first.raw, second.raw) and first.excitation.keys() == (
        second.excitation.keys()
    )
    if not same or not all(
        torch.equal(value, second.excitation[key]) for key, value in first.excitation.items()
    ):
        raise InputError(
            f"{first.vanilla_key!r} and {second.vanilla_key!r} are one Parameter in this "
            "architecture but differ in the file",
            _FIT,
        )


def _misfit(
    model: nn.Module, state: Mapping[str, Tensor], architecture: Architecture, error: Exception
) -> InputError:
    own: dict[str, Any] = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    quantized = [key for key in unexpected if is_quantized(key, state[key])]
    if quantized:
        return InputError(
            f"the state dict is quantized: {quantized[0]!r} holds packed weights or a scale",
            "Give the float checkpoint: excite the float model, and quantize it after training.",
        )
    shapes = [
        f"{key!r} {tuple(value.shape)} against {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    found = [
        *([f"it lacks {len(missing)} such as {missing[0]!r}"] if missing else []),
        *([f"it has {len(unexpected)} more such as {unexpected[0]!r}"] if unexpected else []),
        *([f"{len(shapes)} are of another shape such as {shapes[0]}"] if shapes else []),
    ]
    reason = "; ".join(found) or f"{type(error).__name__}: {error}"
    return InputError(f"the state dict does not fit {architecture.name}: {reason}", _FIT)
