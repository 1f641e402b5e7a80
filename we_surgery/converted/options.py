"""The options of ``convert``, for whatever converts a model later: callbacks and passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, get_args

from we_surgery.converted.sites import Init, Start
from we_surgery.errors import InputError, check_known, near_matches
from we_surgery.planning.config import make_policy
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rules import Rule


class ConvertOptions(TypedDict, total=False):
    """How to convert a model: keyword arguments of :func:`we_surgery.convert`."""

    config: str | Path | Mapping[str, Any] | Policy | None
    rules: Sequence[Rule] | None
    transplants: Sequence[Any] | None
    plan: Plan | None
    init: Init | None
    start: Start
    example_inputs: Any


def resolve_options(mode: str | None, options: ConvertOptions) -> ConvertOptions:
    """The options, checked to fit together, before there is a model."""
    known = ConvertOptions.__annotations__
    for name in options:
        if name not in known:
            raise InputError(
                f"there is no option {name!r}{near_matches(name, known)}",
                f"The options are those of `convert`: {', '.join(known)}.",
            )
    check_known("init", options.get("init") or "paper", get_args(Init))
    check_known("start", options.get("start", "on"), get_args(Start))
    resolved = options.copy()
    config, rules = resolved.pop("config", None), resolved.pop("rules", ())
    transplants = resolved.pop("transplants", ())
    if resolved.get("plan") is None:
        resolved["config"] = make_policy(mode, config, rules, transplants)
    elif mode is not None or config is not None or rules or transplants:
        raise InputError(
            "both a plan and a mode, config, rules or transplants were given",
            "Give the plan alone; edit its rows to change it.",
        )
    return resolved
