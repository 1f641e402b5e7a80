"""A listing of all methods: modes, excitations, transplants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from we_surgery.excitations import EXCITATIONS, Excitation, load_plugins
from we_surgery.planning.policy import MODES
from we_surgery.transplants import TRANSPLANTS, Transplant


@dataclass(frozen=True)
class Method:
    """A row of the listing; of a mode the options are what it sets."""

    name: str
    kind: str
    summary: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    deploys_to: str = ""
    forms: str = "both"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return {**asdict(self), "published": list(self.published)}


def family() -> list[Method]:
    """Every mode, excitation and transplant, registered ones of the user included."""
    load_plugins()
    rows: list[Method] = []
    for name, mode in MODES.items():
        cells = mode.cells | {stage: dict(values) for stage, values in mode.options.items()}
        rows.append(Method(name, "mode", mode.summary, mode.source, cells))
    for name, excitation in sorted(EXCITATIONS.items(), key=lambda item: item[1].order):
        rows.append(_method(name, "excitation", excitation, excitation.options()))
    for name, transplant in TRANSPLANTS.items():
        options = {field.name: field.default for field in fields(transplant)}
        rows.append(_method(name, "transplant", transplant, options))
    return rows


def _method(
    name: str, kind: str, found: type[Excitation | Transplant], options: Mapping[str, Any]
) -> Method:
    return Method(
        name,
        kind,
        found.summary,
        found.source,
        options,
        published=found.published,
        deploys_to=found.deploys_to,
        forms=found.forms,
    )


def family_table() -> RenderableType:
    """The listing as a table of names and descriptions."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    kind = ""
    for row in family():
        if row.kind != kind:
            table.add_row("", "")
            table.add_row(Text(f"{row.kind}s", style="underline"), "")
            kind = row.kind
        lines = [row.summary]
        if row.options and kind != "mode":
            lines.append("options: " + ", ".join(f"{k}={v}" for k, v in row.options.items()))
        lines.append(row.source + (f"; after strip: {row.deploys_to}" if row.deploys_to else ""))
        table.add_row(row.name, Text("\n".join(lines)))
    return table
