"""The options of LWE's attentions, each with its default and its check."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

from we_surgery.excitations.functions import check_choice, check_flag


class Option(NamedTuple):
    """An option of an attention: its default, and a check that returns the value or raises."""

    default: Any
    check: Callable[[str, Any], Any]


def one_of(choices: Collection[str]) -> Callable[[str, Any], str]:
    """The check of an option with these values."""
    return partial(check_choice, choices=choices)


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The check of an option that may be None."""
    return lambda where, value: None if value is None else check(where, value)


def skip_of(own: bool) -> Option:
    """The option ``skip``; ``own`` is the attention's own form, which None selects."""
    return Option(None, lambda where, value: own if value is None else check_flag(where, value))
