"""The plan: one row per weight; as an object, as JSON and as a table."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from we_surgery._util.tables import NARROW, Legend, merge_rows, table_of
from we_surgery._util.text import SafeConsole
from we_surgery._util.version import __version__
from we_surgery.errors import InputError
from we_surgery.planning.rows import Decision, read_rows, row_of
from we_surgery.planning.transplant_rows import TransplantDecision

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)
"""Version 1 had no transplants."""


@dataclass(frozen=True)
class Plan:
    """Decisions for a whole model, as ``convert`` and ``attach`` apply them.

    Attributes:
        mode: the mode it was made from.
        read_by: how the model was read: ``recorded``, ``symbolic`` or ``listed``.
        read_by_reason: why a more precise reading was not possible, or what could not be read.
        decisions: a row for each weight, in the model's order.
        model_parameters: parameters of the vanilla model.
        pattern_matches: how many layers each rule's pattern matched.
        transplants: a row for each place of a transplant, in order. They are inserted first, so
            ``decisions`` has the names of the model with them.
    """

    mode: str
    read_by: str
    read_by_reason: str
    decisions: tuple[Decision, ...]
    model_parameters: int
    pattern_matches: Mapping[str, int] = field(default_factory=dict)
    transplants: tuple[TransplantDecision, ...] = ()

    @property
    def excited(self) -> tuple[Decision, ...]:
        """The rows of the weights that are excited."""
        return tuple(decision for decision in self.decisions if decision.excitation)

    @property
    def changes(self) -> bool:
        """Whether any row changes something."""
        return bool(self.excited) or any(row.attach for row in self.transplants)

    @property
    def added_parameters(self) -> int:
        """The number of added parameters."""
        by_transplants = sum(row.added_parameters for row in self.transplants)
        return by_transplants + sum(decision.added_parameters for decision in self.decisions)

    @property
    def kept_parameters(self) -> int:
        """The number of added parameters that stay after strip (transplants)."""
        return sum(row.added_parameters for row in self.transplants if row.stays)

    @property
    def kept(self) -> Plan:
        """The part of the plan that applies after strip: the transplants that stay."""
        kept = tuple(row for row in self.transplants if row.stays)
        return replace(self, decisions=(), pattern_matches={}, transplants=kept)

    def after(self, earlier: Plan | None) -> Plan:
        """This plan, for a model to which the plan ``earlier`` was applied before."""
        if earlier is None:
            return self
        return replace(self, transplants=(*earlier.transplants, *self.transplants))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, with the schema's version."""
        return {
            "schema": SCHEMA_VERSION,
            "we_surgery": __version__,
            "mode": self.mode,
            "read_by": self.read_by,
            "read_by_reason": self.read_by_reason,
            "model_parameters": self.model_parameters,
            "added_parameters": self.added_parameters,
            "pattern_matches": dict(self.pattern_matches),
            "transplants": [row.to_dict() for row in self.transplants],
            "layers": [row_of(decision) for decision in self.decisions],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the plan") -> Plan:
        """The inverse of :meth:`to_dict`; totals are counted anew.

        Raises:
            InputError: a newer schema, a missing key, or a value of the wrong type.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), list):
            raise InputError(
                f"{source} is not a plan: it has no list `layers`",
                "Make one with `we-convert MODEL --dry-run --json`.",
            )
        if data.get("schema") not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            raise InputError(
                f"{source} has schema {data.get('schema')!r}; this version reads {known}",
                "Make the plan again, or install the version of we_surgery that wrote it.",
            )
        return cls(
            mode=str(data.get("mode", "")),
            read_by=str(data.get("read_by", "")),
            read_by_reason=str(data.get("read_by_reason", "")),
            decisions=read_rows(data["layers"], source),
            model_parameters=int(data.get("model_parameters", 0)),
            pattern_matches=dict(data.get("pattern_matches", {})),
            transplants=tuple(
                TransplantDecision.from_dict(row, source) for row in data.get("transplants") or ()
            ),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """A plan from a JSON file, edited or not.

        Raises:
            InputError: the file cannot be read or does not hold a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the plan {path} cannot be read: {error}",
                "Make one with `we-convert MODEL --dry-run --json > plan.json`.",
            ) from error
        return cls.from_dict(data, str(path))

    def __str__(self) -> str:
        buffer = io.StringIO()
        SafeConsole(file=buffer, width=NARROW).print(plan_table(self), crop=False)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


# The plan as a table for people.

_EXPENDABLE = ("kind", "class", "added", "shape")
_RIGHT = ("n", "added")


def plan_table(plan: Plan, *, wide: bool = False, width: int = NARROW) -> RenderableType:
    """Transplants, weights and totals."""
    weights = [
        {
            "layer": row.layer or "(the model itself)",
            "kind": f"{row.kind} g{row.groups}" if row.groups > 1 else row.kind,
            "shape": "x".join(map(str, row.shape)),
            "decision": Text(row.verdict, style="green" if row.excitation else "dim"),
            "added": row.added_parameters,
            "why": row.reason,
        }
        for row in plan.decisions
    ]
    places = [
        {
            "place": row.place or "(the model itself)",
            "class": row.type_name.rpartition(".")[2],
            "transplant": _transplant(row),
            "added": row.added_parameters,
            "why": row.reason if row.attach else f"{row.transplant}: {row.reason}",
        }
        for row in plan.transplants
    ]
    tables: list[RenderableType] = []
    for rows in (places, weights):
        if rows:
            tables += _wide(rows) if wide else _narrow(rows, width)
    return Group(*tables, Text(plan_summary(plan)))


def _transplant(row: TransplantDecision) -> Text:
    options = ", ".join(f"{k}={v}" for k, v in row.options.items() if v is not None)
    verdict = f"{row.transplant} ({options})" if options else row.transplant
    return Text(verdict, style="green") if row.attach else Text("skip", style="dim")


Row = Mapping[str, Any]
"""A cell for each heading; the name comes first, "added" is a number, "why" a reason."""


def _wide(rows: Sequence[Row]) -> list[RenderableType]:
    return [table_of([{**row, "added": _number(row["added"])} for row in rows], right=_RIGHT)]


def _narrow(rows: Sequence[Row], width: int) -> list[RenderableType]:
    legend = Legend(row["why"] for row in rows)
    lettered = [{**row, "why": legend.letter(row["why"])} for row in rows]
    shown = [{**row, "added": _number(count * row["added"])} for row, count in merge_rows(lettered)]
    table = table_of(shown, width=width, expendable=_EXPENDABLE, right=_RIGHT)
    return [table, "", legend.table(), ""]


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


_READ_BY = {
    "recorded": "graph from a recorded forward pass",
    "symbolic": "graph from symbolic tracing",
    "listed": "module tree alone, no graph",
}


def plan_summary(plan: Plan) -> str:
    """Totals and how the model was read, in a few lines."""
    train = plan.model_parameters + plan.added_parameters
    lines = [
        f"mode {plan.mode}; {_READ_BY.get(plan.read_by, plan.read_by)}"
        + (f" ({plan.read_by_reason})" if plan.read_by_reason else ""),
        f"{len(plan.excited)} of {len(plan.decisions)} weights excited",
        f"parameters: {train:,} in training ({plan.added_parameters:,} added), "
        f"{plan.model_parameters + plan.kept_parameters:,} after strip",
    ]
    for name in dict.fromkeys(row.transplant for row in plan.transplants):
        rows = [row for row in plan.transplants if row.transplant == name]
        lines.append(f"{name}: put in at {sum(row.attach for row in rows)} of {len(rows)} places")
    lines += [f"pattern {p!r} matched {n} layers" for p, n in plan.pattern_matches.items()]
    return "\n".join(lines)
