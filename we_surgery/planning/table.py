"""A plan as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a plan prints itself by this table
    from we_surgery.planning.plans import Plan


def plan_table(plan: Plan) -> RenderableType:
    """A row for each place of a transplant, one for each weight, totals below."""
    table = Table(header_style="bold")
    for heading in ("layer", "kind", "shape", "decision", "reason"):
        table.add_column(heading, overflow="fold")
    table.add_column("added parameters", justify="right")
    for row in plan.decisions:
        kind = f"{row.kind} g{row.groups}" if row.groups > 1 else row.kind
        table.add_row(
            Text(row.layer or "(the model itself)"),
            kind,
            "x".join(map(str, row.shape)),
            Text(row.verdict, style="green" if row.excitation else "dim"),
            Text(row.reason),
            f"{row.added_parameters:,}" if row.added_parameters else "",
        )
    tables = [_transplant_table(plan), table] if plan.transplants else [table]
    return Group(*tables, Text(plan_summary(plan)))


def _transplant_table(plan: Plan) -> Table:
    table = Table(header_style="bold")
    for heading in ("place", "class", "transplant", "reason"):
        table.add_column(heading, overflow="fold")
    table.add_column("added parameters", justify="right")
    for row in plan.transplants:
        options = ", ".join(f"{k}={v}" for k, v in row.options.items() if v is not None)
        verdict = f"{row.transplant} ({options})" if options else row.transplant
        table.add_row(
            Text(row.place or "(the model itself)"),
            row.type_name.rpartition(".")[2],
            Text(verdict, style="green") if row.attach else Text("skip", style="dim"),
            Text(row.reason if row.attach else f"{row.transplant}: {row.reason}"),
            f"{row.added_parameters:,}" if row.added_parameters else "",
        )
    return table


def plan_summary(plan: Plan) -> str:
    """Totals and how the model was read, in a few lines."""
    train = plan.model_parameters + plan.added_parameters
    lines = [
        f"mode {plan.mode}; read by {plan.rung}"
        + (f" ({plan.rung_reason})" if plan.rung_reason else ""),
        f"{len(plan.excited)} of {len(plan.decisions)} weights excited; parameters: "
        f"{train:,} in training ({plan.added_parameters:,} added), "
        f"{plan.model_parameters + plan.kept_parameters:,} after strip",
    ]
    for name in dict.fromkeys(row.transplant for row in plan.transplants):
        rows = [row for row in plan.transplants if row.transplant == name]
        lines.append(f"{name}: put in at {sum(row.attach for row in rows)} of {len(rows)} places")
    lines += [f"pattern {p!r} matched {n} layers" for p, n in plan.pattern_matches.items()]
    return "\n".join(lines)
