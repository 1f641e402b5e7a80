"""Excitations by name: registered, built from options, rebuilt from a state dict."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

from torch import Tensor, nn

from we_surgery.errors import InputError, check_known, near_matches
from we_surgery.excitations.base import Device, DType, Excitation
from we_surgery.excitations.composition import Composition
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.record import (
    RECORD_KEY,
    SCHEMA_VERSION,
    Record,
    is_record,
    make_record,
    read_record,
    stage_names,
    to_tensor,
)
from we_surgery.excitations.standardize import Rescale

EXCITATIONS: dict[str, type[Excitation]] = {}
"""Every excitation by its name in configs, plans and state dicts."""

_RESERVED = {
    *(Rescale.name, Composition.name, "skip", "mode", "rules", "match", "excite"),
    *("conv", "depthwise", "shift", "linear", "gate", "paused", "transposed_groups"),
}
"""Names with another meaning in configs or state dicts."""

_Class = TypeVar("_Class", bound=type[Excitation])

Stages = Sequence[Mapping[str, Mapping[str, Any]]]
"""What a layer gets: ``[{"standardize": {}}, {"lwe": {"reduction": 16}}]``; empty: skipped."""


def register_excitation(excitation: _Class) -> _Class:
    """Makes a method of your own known to configs, plans, files and the command line.

    Call it, or use it as a decorator, in a module that the converting, loading or stripping
    program imports. Registering the same class again has no effect.

    Args:
        excitation: a class with ``name`` and ``order``.

    Raises:
        InputError: the name is taken, is not an identifier, or is a key of configs; or the class
            is abstract.
    """
    name = getattr(excitation, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or not hasattr(excitation, "order"):
        raise InputError(
            f"{excitation.__name__} has no usable `name` and `order`: {name!r}",
            'Give it a class attribute such as `name = "my_excitation"`, and an `order`.',
        )
    missing = sorted(getattr(excitation, "__abstractmethods__", ()))
    if missing:
        raise InputError(
            f"{excitation.__name__} does not define {', '.join(missing)}", "Define them."
        )
    known = EXCITATIONS.get(name)
    if name in _RESERVED or known not in (None, excitation):
        raise InputError(
            f"the name {name!r} is taken by {known.__name__ if known else 'a key of configs'}",
            f"Give {excitation.__name__} another `name`.",
        )
    EXCITATIONS[name] = excitation
    return excitation


_PLUGINS = "we_surgery.excitations"
"""The entry point group for excitations of installed packages."""


def load_plugins(names: Container[object] | None = None) -> None:
    """Registers excitations of installed packages: those of the given names, or all."""
    for point in metadata.entry_points(group=_PLUGINS):
        if point.name in EXCITATIONS or (names is not None and point.name not in names):
            continue
        try:
            excitation = point.load()
        except Exception as error:
            raise InputError(
                f"the excitation {point.name!r} of the entry point {point.value!r} cannot be "
                f"imported: {type(error).__name__}: {error}",
                "Repair or uninstall the package that brings it.",
            ) from error
        if getattr(excitation, "name", None) != point.name:
            raise InputError(
                f"the entry point {point.value!r} is called {point.name!r}, but its class is not",
                "Give the entry point the `name` of its class.",
            )
        register_excitation(excitation)


def check_stage(name: object, options: object = None) -> type[Excitation]:
    """The class of the stage ``name``; an InputError if it or an option does not exist."""
    if isinstance(name, str) and name not in EXCITATIONS:
        load_plugins([name])
    excitation = EXCITATIONS[check_known("excitation called", name, EXCITATIONS)]
    known = excitation.options()
    if options is not None and not isinstance(options, Mapping):
        raise InputError(
            f"the options of {name} must be a mapping, not {options!r}",
            f"Write them as {{{', '.join(f'{k}: {v}' for k, v in known.items())}}}.",
        )
    for option in options or {}:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r}{near_matches(str(option), known)}",
                f"Its options are: {', '.join(known)}." if known else "It has no options.",
            )
    return excitation


def build_excitation(
    stages: Stages,
    layout: WeightLayout,
    *,
    device: Device = None,
    dtype: DType = None,
    parts: dict[Hashable, nn.Module] | None = None,
) -> Composition:
    """A new composition for one layer, its parameters in their default initialization.

    ``parts`` holds the modules that all layers of one model share, and is filled. An unknown stage
    or option is an InputError.
    """
    try:
        built = [
            check_stage(name, options).for_layout(layout, device=device, dtype=dtype, **options)
            for stage in stages
            for name, options in stage.items()
        ]
        composition = Composition(built, layout.groups if layout.transposed else None)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error), "Correct the option in the config, rule or plan.") from error
    if device is not None:
        composition.to(device)
    composition.share({} if parts is None else parts)
    for stage in composition.stages:
        try:
            to_tensor(make_record([{stage.name: stage.chosen_options()}]))
        except AttributeError as error:
            raise InputError(
                f"{type(stage).__name__} does not keep its options: {error}",
                "Keep each option of `__init__` as an attribute of its name, or write "
                "`chosen_options`.",
            ) from error
    return composition


def rebuild_excitation(state: Mapping[str, Tensor], record: Record | None = None) -> Composition:
    """A composition with the stages and options of its record, and the values of ``state``.

    ``state`` holds the entries below a layer's ``excitation.``, such as ``lwe.fc1.weight``. A
    record that does not fit the tensors exactly is an InputError.
    """
    tensors = {key: value for key, value in state.items() if not is_record(key)}
    if record is None:
        if RECORD_KEY not in state:
            raise InputError(
                f"an excitation has no record beside its tensors {sorted(tensors)}",
                "Give all of the model's state dict, `model.state_dict()`.",
            )
        record = read_record(state[RECORD_KEY])
    record = _completed(record)
    by_stage: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stage, _, rest = key.partition(".")
        by_stage.setdefault(stage, {})[rest] = value
    try:
        stages = [
            _stage_class(name).from_state(by_stage.get(name, {}), options)
            for stage in record["stages"]
            for name, options in stage.items()
        ]
        composition = Composition(stages, record["transposed_groups"])
        composition.set_paused(record["paused"])
        own = composition.state_dict()
        if composition.record != record:
            raise ValueError(f"its record should be {composition.record}, and is {record}")
        records = {key: value for key, value in own.items() if is_record(key)}
        composition.load_state_dict({**tensors, **records}, strict=True, assign=True)
    except InputError:
        raise
    except (KeyError, RuntimeError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"an excitation of the stages {'+'.join(stage_names(record))} cannot be rebuilt from "
            f"its tensors {sorted(tensors)}: {error}",
            "The file is damaged or comes from another version; save it again.",
        ) from error
    return composition


def _completed(record: Record) -> Record:
    """The record of an earlier version in the current schema."""
    if record["schema"] == SCHEMA_VERSION:
        return record
    stages = [
        {name: _stage_class(name).completed(options)}
        for stage in record["stages"]
        for name, options in stage.items()
    ]
    return {**record, "schema": SCHEMA_VERSION, "stages": stages}


def _stage_class(name: str) -> type[Excitation]:
    return Rescale if name == Rescale.name else check_stage(name)
