"""A plan as a table for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from we_surgery.planning import Plan


def plan_table(plan: Plan) -> RenderableType:
    """Layer, kind, shape, decision, reason and added parameters; totals below."""
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
    return Group(table, Text(plan_summary(plan)))


def plan_summary(plan: Plan) -> str:
    """Totals and how the model was read, in a few lines."""
    train = plan.model_parameters + plan.added_parameters
    lines = [
        f"mode {plan.mode}; read by {plan.rung}"
        + (f" ({plan.rung_reason})" if plan.rung_reason else ""),
        f"{len(plan.excited)} of {len(plan.decisions)} weights excited; parameters: "
        f"{train:,} in training ({plan.added_parameters:,} added), "
        f"{plan.model_parameters:,} after strip",
    ]
    lines += [f"pattern {p!r} matched {n} layers" for p, n in plan.pattern_matches.items()]
    return "\n".join(lines)
