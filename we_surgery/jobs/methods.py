"""All methods there are, as a listing: modes, the excitations they are made of, transplants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from we_surgery.excitations import EXCITATIONS
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
    """

    name: str
    kind: str
    summary: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    deploys_to: str = ""

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
    excitations = [
        Method(
            name=name,
            kind="excitation",
            summary=excitation.summary,
            source=excitation.source,
            options=excitation.options(),
            published=excitation.published,
            deploys_to=excitation.deploys_to,
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
        )
        for name, transplant in TRANSPLANTS.items()
    ]
    return modes + excitations + transplants


def family_table() -> RenderableType:
    """The listing as tables for people."""
    modes = Table(title="modes", title_justify="left", header_style="bold")
    for heading in ("mode", "what it does", "source"):
        modes.add_column(heading, overflow="fold")
    tables = {
        kind: Table(title=f"{kind}s", title_justify="left", header_style="bold")
        for kind in ("excitation", "transplant")
    }
    for kind, table in tables.items():
        for heading in (kind, "what it does", "options", "source", "after strip"):
            table.add_column(heading, overflow="fold")
    for row in family():
        if row.kind == "mode":
            modes.add_row(row.name, Text(row.summary), Text(row.source))
        else:
            options = ", ".join(f"{key}={value}" for key, value in row.options.items())
            cells = (row.summary, options, row.source, row.deploys_to)
            tables[row.kind].add_row(row.name, *map(Text, cells))
    return Group(modes, *tables.values())
