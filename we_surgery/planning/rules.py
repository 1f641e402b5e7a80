"""Exceptions to a mode: which layers a pattern matches, and what they get."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from we_surgery.errors import InputError
from we_surgery.excitations import check_stage
from we_surgery.excitations.stage_text import SKIP, parse_stages

STANDARDIZE_CHOICES = ("auto", "on", "off")

Pattern = str | type | Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Rule:
    """An exception: matching layers get other stages or options.

    Attributes:
        match: a name glob (``layer4.*``; ``*`` also crosses dots), a regular expression
            (``re:layer[34]``, searched in the name), a class by name (``type:StdConv2d``,
            subclasses included), a class, or a callable ``(module, name) -> bool``.
        excite: stage names joined by ``+``, or ``skip``; None keeps the mode's choice. A stage may
            bring its options: ``lwe(attention=cbam, skip=true)+mwe``.
        standardize: ``auto``, ``on`` or ``off``; None keeps the policy's choice.
        options: options by stage name, such as ``{"lwe": {"reduction": 8}}``.
    """

    match: Pattern
    excite: str | None = None
    standardize: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {name: dict(values) for name, values in self.options.items()}
        if self.excite is not None:
            stages = parse_stages(self.excite, f"rule {self.pattern!r}")
            object.__setattr__(self, "excite", "+".join(stages) or SKIP)
            for name, typed in stages.items():
                if typed:
                    options[name] = options.get(name, {}) | typed
        object.__setattr__(self, "options", options)
        standardize = check_standardize(self.standardize, f"rule {self.pattern!r}")
        object.__setattr__(self, "standardize", standardize)
        for name, own in self.options.items():
            check_stage(name, own)
        if isinstance(self.match, str) and self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise InputError(
                    f"the pattern {self.match!r} is not a valid regular expression: {error}",
                    "Correct it, or drop 're:' to use it as a name glob.",
                ) from error

    @property
    def pattern(self) -> str:
        """The pattern as text."""
        if isinstance(self.match, str):
            return self.match
        if isinstance(self.match, type):
            return f"type:{self.match.__name__}"
        return f"callable:{getattr(self.match, '__name__', type(self.match).__name__)}"

    def matches(self, module: nn.Module, name: str) -> bool:
        """Whether the layer ``name`` with the owner ``module`` falls under this rule."""
        if isinstance(self.match, type):
            return isinstance(module, self.match)
        if not isinstance(self.match, str):
            return bool(self.match(module, name))
        if self.match.startswith("re:"):
            return re.search(self.match[3:], name) is not None
        if self.match.startswith("type:"):
            wanted = self.match[5:]
            classes = type(module).__mro__
            return any(wanted in (c.__name__, f"{c.__module__}.{c.__name__}") for c in classes)
        return fnmatch.fnmatchcase(name, self.match)


def check_standardize(value: object, where: str) -> str | None:
    """``auto``, ``on``, ``off`` or None, as YAML gave it."""
    # YAML reads a bare on and off as true and false.
    value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if value is not None and value not in STANDARDIZE_CHOICES:
        raise InputError(
            f"{where}: standardize cannot be {value!r}",
            f"Use one of: {', '.join(STANDARDIZE_CHOICES)}.",
        )
    return value
