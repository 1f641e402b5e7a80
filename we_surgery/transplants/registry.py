"""The transplants by name, and how a config asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from we_surgery._util.settings import filled
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations.stage_text import name_and_options
from we_surgery.transplants.attention import CBAM, SqueezeExcitation
from we_surgery.transplants.bam import BAMTransplant
from we_surgery.transplants.base import Transplant
from we_surgery.transplants.max_dropout import MaxDropoutTransplant
from we_surgery.transplants.shift import ShiftTransplant

TRANSPLANTS: dict[str, type[Transplant]] = {
    transplant.name: transplant
    for transplant in (
        SqueezeExcitation,
        CBAM,
        BAMTransplant,
        MaxDropoutTransplant,
        ShiftTransplant,
    )
}
"""Every transplant by the name that configs and plans use."""


def build_transplant(name: object, options: object = None, where: str = "") -> Transplant:
    """A transplant from its name and options."""
    prefix = f"{where}: " if where else ""
    if not isinstance(name, str) or name not in TRANSPLANTS:
        raise InputError(
            f"{prefix}there is no transplant called {name!r}{near_matches(str(name), TRANSPLANTS)}",
            f"Use one of: {', '.join(TRANSPLANTS)}.",
        )
    transplant = TRANSPLANTS[name]
    shown = ", ".join(f"{field.name}: {field.default}" for field in fields(transplant))
    hint = f"Its options are {{{shown}}}."
    try:
        return filled(transplant, options or {}, f"{name} in {where}" if where else name, hint)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{prefix}{name}: {error}", hint) from error


def parse_transplants(asked: Any, where: str = "transplants") -> tuple[Transplant, ...]:
    """A list such as ``["se", {"max_dropout": {"rate": 0.3}}]`` as transplants.

    Args:
        asked: names, with options or without (``max_dropout(rate=0.3)``), mappings of a name to
            its options, and ready-made transplants.
        where: what asks for them, for messages.
    """
    if asked is None:
        return ()
    if not isinstance(asked, Sequence) or isinstance(asked, str):
        raise InputError(
            f"{where} is not a list but {asked!r}",
            "Write for example `[se]` or `[{max_dropout: {rate: 0.3}}]`.",
        )
    found: list[Transplant] = []
    for item in asked:
        if isinstance(item, Transplant):
            found.append(item)
        elif isinstance(item, Mapping):
            found += [build_transplant(name, options, where) for name, options in item.items()]
        else:
            found.append(build_transplant(*name_and_options(str(item), where), where))
    return tuple(found)
