"""A listing of all methods: modes, excitations, transplants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from we_surgery.excitations import EXCITATIONS, load_plugins
from we_surgery.planning.policy import MODES
from we_surgery.transplants import TRANSPLANTS


@dataclass(frozen=True)
class Method:
    """A row of the listing.

    Attributes:
        name: as configs, rules and the command line take it.
        kind: ``mode``, ``excitation`` or ``transplant``.
        summary: what it does, in a line.
        source: the paper and section or table.
        options: the options' names and defaults; for a mode, what it sets.
        published: the results its authors print.
        deploys_to: what is left of it after strip.
        forms: which form trains it.
    """

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
    modes = [
        Method(
            name=name,
            kind="mode",
            summary=mode.summary,
            source=mode.source,
            options=mode.cells | {stage: dict(values) for stage, values in mode.options.items()},
        )
        for name, mode in MODES.items()
    ]
    load_plugins()
    excitations = [
        Method(
            name=name,
            kind="excitation",
            summary=excitation.summary,
            source=excitation.source,
            options=excitation.options(),
            published=excitation.published,
            deploys_to=excitation.deploys_to,
            forms=excitation.forms,
        )
        for name, excitation in sorted(EXCITATIONS.items(), key=lambda item: item[1].order)
    ]
    transplants = [
        Method(
            name=name,
            kind="transplant",
            summary=transplant.summary,
            source=transplant.source,
            options={field.name: field.default for field in fields(transplant)},
            published=transplant.published,
            deploys_to=transplant.deploys_to,
            forms=transplant.forms,
        )
        for name, transplant in TRANSPLANTS.items()
    ]
    return modes + excitations + transplants


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
