"""Mappings from a file or a command line -> dataclasses; what does not fit is named."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

from we_surgery.errors import InputError, near_matches

Settings = TypeVar("Settings")


def filled(kind: type[Settings], values: Any, where: str, hint: str) -> Settings:
    """A dataclass from a mapping, each value checked against its field's type."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is not a mapping but {values!r}", hint)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    refuse_unknown(values, fields, where)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}", hint)
    kinds = typing.get_type_hints(kind)
    return kind(**{k: _checked(v, kinds[k], f"{k} in {where}") for k, v in values.items()})


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises an InputError for a key that is not known."""
    known = list(dict.fromkeys(known))
    for key in values:
        if key not in known:
            raise InputError(
                f"{where} has an unknown key {key!r}{near_matches(str(key), known)}",
                f"Known keys are: {', '.join(known)}.",
            )


def _checked(value: Any, wanted: Any, where: str) -> Any:
    """A value as YAML gave it, made to fit its field."""
    origin, choices = typing.get_origin(wanted), get_args(wanted)
    if origin is Literal:
        if value in choices:
            return value
        hint = near_matches(str(value), choices)
        raise InputError(f"{where} is {value!r}{hint}", f"Use one of: {', '.join(choices)}.")
    if origin in (types.UnionType, typing.Union):  # the latter with a Literal
        return None if value is None else _checked(value, choices[0], where)
    kind = origin or wanted
    if kind is tuple and isinstance(value, list) and all(_is_number(v) for v in value):
        return tuple(value)
    if kind is float and _is_number(value):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{where} cannot be {value!r}", f"Give {_IN_WORDS[kind]}.")


_IN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a list of numbers",
    Mapping: "a mapping",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
