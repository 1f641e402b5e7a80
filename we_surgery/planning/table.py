"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from we_surgery._util.tables import NARROW, Legend, merge_rows, table_of

if TYPE_CHECKING:  # a plan prints itself by this table
    from we_surgery.planning.plans import Plan
    from we_surgery.planning.transplant_rows import TransplantDecision

_EXPENDABLE = ("kind", "class", "added", "shape")
_RIGHT = ("n", "added")


def plan_table(plan: Plan, *, wide: bool = False, width: int = NARROW) -> RenderableType:
    """Transplants, weights and totals.

    Args:
        plan: what is shown.
        wide: whether each weight gets a line with its reason in full; otherwise weights of which
            the same is said share one, and letters stand for reasons.
        width: characters in a line that is not wide.
    """
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


def plan_summary(plan: Plan) -> str:
    """Totals and how the model was read, in a few lines."""
    train = plan.model_parameters + plan.added_parameters
    lines = [
        f"mode {plan.mode}; read by {plan.read_by}"
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
