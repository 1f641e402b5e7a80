"""The metadata that our self-describing files store beside their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from we_surgery._util.version import __version__
from we_surgery.checkpoint.architecture import Architecture
from we_surgery.errors import InputError, damaged
from we_surgery.planning.plans import Plan

METADATA_KEY = "we_surgery"
SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)

_MOST_VALUES = 300_000


@dataclass(frozen=True)
class Metadata:
    """The plan of a file's conversion (``Plan.to_dict()``), and its architecture if known."""

    plan: Mapping[str, Any] | None = None
    architecture: Architecture | None = None

    @property
    def stored_plan(self) -> Plan | None:
        """The plan as one."""
        return None if self.plan is None else Plan.from_dict(self.plan, "the plan in the file")

    def to_dict(self) -> dict[str, Any]:
        """The metadata as JSON types, with the schema's version."""
        architecture = self.architecture
        is_stored = architecture is not None and not architecture.names_folder
        return {
            "schema": SCHEMA_VERSION,
            "we_surgery": __version__,
            "plan": None if self.plan is None else dict(self.plan),
            "architecture": architecture.to_dict() if architecture and is_stored else None,
        }

    @staticmethod
    def from_dict(data: Any, source: str = "the file") -> Metadata:
        """The inverse of :meth:`to_dict`."""
        _refuse_unreadable(data, source)
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if type(schema) is int and schema > SCHEMA_VERSION:
            raise InputError(
                f"{source} was written by we_surgery {data.get('we_surgery')} (schema {schema}); "
                f"this version reads schemas up to {SCHEMA_VERSION}",
                "Install the version of we_surgery that wrote it.",
            )
        plan = data.get("plan") if isinstance(data, Mapping) else None
        if (
            type(schema) is not int
            or schema not in _READ_VERSIONS
            or not (plan is None or isinstance(plan, Mapping))
        ):
            raise damaged(f"the metadata of {source} cannot be read")
        architecture = data.get("architecture")
        return Metadata(
            plan=plan,
            architecture=None if architecture is None else Architecture.from_dict(architecture),
        )

    def to_json(self) -> str:
        """The metadata as one line of JSON, as safetensors headers hold it."""
        try:
            return json.dumps(self.to_dict())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the metadata cannot be stored: {error}",
                "Give the plan as `Plan.to_dict()` returns it.",
            ) from error

    @staticmethod
    def from_json(text: str, source: str = "the file") -> Metadata:
        """The inverse of :meth:`to_json`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise damaged(f"the metadata of {source} cannot be read: {error}") from error
        return Metadata.from_dict(data, source)


def _refuse_unreadable(data: Any, source: str) -> None:
    """Raises unless ``data`` has JSON's types and a size that can be written as text.

    A few bytes of pickle can fill the memory as text: a list that holds another one twice, which
    holds another one twice.
    """
    pending = [data]
    for _ in range(_MOST_VALUES):
        if not pending:
            return
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(dict.keys(value))
            pending.extend(dict.values(value))
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif not (value is None or isinstance(value, str | int | float)):
            break
    raise damaged(f"the metadata of {source} is too large or not plain JSON")
