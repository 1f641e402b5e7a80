"""One page about one or several files: no network, no script, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from we_surgery._util.version import __version__
from we_surgery.analysis.learned import learned_nothing
from we_surgery.analysis.results import LocationMaps
from we_surgery.errors import InputError
from we_surgery.jobs.inspect import Comparison, Inspection
from we_surgery.planning.plans import Plan

_BAR = 220
_CELL = 22
# Viridis at nine even steps; between them it is interpolated.
_VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)


def html_report(found: Inspection | Comparison, maps: LocationMaps | None = None) -> str:
    """The page about one file or several as text, with importance maps to show."""
    files = found.inspections if isinstance(found, Comparison) else [found]
    environment = Environment(
        loader=PackageLoader("we_surgery.jobs", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["fmt"] = format
    return environment.get_template("report.html.j2").render(
        title=" and ".join(file.source for file in files),
        version=__version__,
        files=files,
        plans=[(file.source, plan) for file in files if (plan := _plan(file)) is not None],
        costs=_costs(files),
        comparison=found if isinstance(found, Comparison) else None,
        maps=None if maps is None else _maps(maps),
        learned_nothing=learned_nothing,
    )


def _costs(files: Sequence[Inspection]) -> list[dict[str, Any]]:
    largest = max((file.values for file in files), default=1) or 1
    rows = []
    for file in files:
        multiply_adds = sum(layer.statistics.multiply_adds for layer in file.layers)
        named = f"{file.source}: " if len(files) > 1 else ""
        form = "in training" if file.layers else "vanilla"
        kinds = [(form, file.values, file.size, multiply_adds)]
        if file.layers:
            kinds.append(("after strip", file.stripped_values, file.stripped_size, 0))
        for name, values, size, work in kinds:
            kept = min(values, file.stripped_values)
            added = values - kept
            rows.append(
                {
                    "name": named + name,
                    "values": values,
                    "size": _bytes(size),
                    "multiply_adds": work,
                    "width": f"{_BAR * kept / largest:.1f}",
                    "added_width": f"{_BAR * added / largest:.1f}" if added else "",
                }
            )
    return rows


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e4 else f"{size:,} bytes"


def _plan(file: Inspection) -> Plan | None:
    try:
        return None if file.plan is None else Plan.from_dict(file.plan, file.source)
    except InputError:  # of another version: the page is worth having without it
        return None


def _maps(maps: LocationMaps) -> dict[str, Any]:
    drops = [value for one in maps.maps for line in one.drops for value in line]
    lowest, highest = min(drops, default=0.0), max(drops, default=0.0)
    spread = highest - lowest or 1.0
    return {
        "score": maps.score.replace("_", " "),
        "lowest": f"{lowest:.3g}",
        "highest": f"{highest:.3g}",
        "scale": [viridis(step / 63) for step in range(64)],
        "maps": [
            {
                "layer": one.layer,
                "width": _CELL * len(one.in_channels),
                "height": _CELL * len(one.out_channels),
                "cells": [
                    {
                        "x": _CELL * column,
                        "y": _CELL * row,
                        "color": viridis((drop - lowest) / spread),
                        "title": f"output {output}, input {channel}: {drop:.4g}",
                    }
                    for row, (output, line) in enumerate(
                        zip(one.out_channels, one.drops, strict=True)
                    )
                    for column, (channel, drop) in enumerate(
                        zip(one.in_channels, line, strict=True)
                    )
                ],
            }
            for one in maps.maps
        ],
    }


def viridis(value: float) -> str:
    """The colour of a number from 0 to 1, as ``#rrggbb``."""
    place = min(max(value, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    low, high = list(pairwise(_VIRIDIS))[index]
    mixed = (round(a + (place - index) * (b - a)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
