"""Stages as people type them: ``lwe(attention=cbam, skip=true)+mwe``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from we_surgery.errors import InputError
from we_surgery.excitations import EXCITATIONS, check_stage

SKIP = "skip"

_STAGE = r"\w+(?:\([^()]*\))?"
STAGES_PATTERN = rf"{_STAGE}(?:\s*\+\s*{_STAGE})*"
"""A regular expression for what :func:`parse_stages` reads."""


class YAMLLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text."""


YAMLLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_stages(text: object, where: str) -> dict[str, dict[str, Any]]:
    """The stages of ``lwe+mwe(epsilon=0.2)`` with their options, checked; none for ``skip``.

    Values of options are YAML. An error begins with ``where``.
    """
    if text == SKIP:
        return {}
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{where}: {text!r} is not a list of stages",
            f"Write {SKIP}, one of {', '.join(EXCITATIONS)}, or several joined by '+'.",
        )
    stages: list[tuple[str, Mapping[str, Any]]] = []
    for part in (found.strip() for found in re.split(r"\+(?![^()]*\))", text)):
        name, options = name_and_options(part, where)
        check_stage(name, options)
        stages.append((name, options))
    names = [name for name, _ in stages]
    orders = [EXCITATIONS[name].order for name in names]
    if len(set(names)) == len(names) > len(set(orders)):
        raise InputError(
            f"{where}: two of the stages of {text!r} exclude each other",
            "Keep one of those that take the same place, such as one normalization.",
        )
    if orders != sorted(set(orders)):
        ordered = sorted(set(names), key=lambda name: EXCITATIONS[name].order)
        raise InputError(
            f"{where}: the stages of {text!r} are out of order or repeated",
            f"Write {'+'.join(ordered)}: that is the order they run in.",
        )
    return {name: dict(options) for name, options in stages}


def name_and_options(text: str, where: str) -> tuple[str, Mapping[str, Any]]:
    """``lwe(reduction=8)`` as name and options, unchecked."""
    name, _, rest = text.partition("(")
    if not rest:
        return name, {}
    unreadable = InputError(
        f"{where}: the options of {text!r} cannot be read",
        "Write them as lwe(reduction=8)+mwe(epsilon=0.2).",
    )
    if not rest.endswith(")"):
        raise unreadable
    try:
        options = yaml.load("{" + rest[:-1].replace("=", ": ") + "}", YAMLLoader)
    except yaml.YAMLError as error:
        raise unreadable from error
    assert isinstance(options, Mapping)
    return name, options
