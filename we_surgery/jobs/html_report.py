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
from we_surgery.jobs.inspect import Comparison, InspectedWeight, Inspection
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
    """The page as text.

    Args:
        found: of one file or several.
        maps: importance maps to show.
    """
    files = found.inspections if isinstance(found, Comparison) else [found]
    environment = Environment(
        loader=PackageLoader("we_surgery", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=" and ".join(file.source for file in files),
        version=__version__,
        files=[_file(file) for file in files],
        costs=_costs(files),
        comparison=_comparison(found) if isinstance(found, Comparison) else None,
        maps=None if maps is None else _maps(maps),
    )


def _file(file: Inspection) -> dict[str, Any]:
    found = [layer.statistics.multiplier for layer in file.layers]
    multipliers = [statistics for statistics in found if statistics is not None]
    return {
        "source": file.source,
        "kind": file.kind,
        "tensors": file.tensors,
        "architecture": file.architecture,
        "mode": file.mode,
        "notes": file.notes,
        "is_attached": file.is_attached,
        "learned": file.learned,
        "nothing": learned_nothing(layer.statistics.verdict for layer in file.layers),
        "low": f"{min((one.low for one in multipliers), default=0):g}",
        "high": f"{max((one.high for one in multipliers), default=1):g}",
        "has_start": any(layer.statistics.raw_distance is not None for layer in file.layers),
        "has_gain": any(layer.statistics.gain is not None for layer in file.layers),
        "layers": [_layer(layer) for layer in file.layers],
        "plan": _plan(file),
    }


def _layer(layer: InspectedWeight) -> dict[str, Any]:
    found = layer.statistics
    multiplier, gain = found.multiplier, found.gain
    distances = (found.raw_distance, found.excitation_distance)
    return {
        "name": layer.name,
        "shape": " x ".join(map(str, layer.shape)),
        "stages": "+".join(layer.stages),
        "bars": [] if multiplier is None else _bars(multiplier.histogram),
        "range": ""
        if multiplier is None
        else f"{multiplier.minimum:.2f} to {multiplier.maximum:.2f}",
        "mean": "" if multiplier is None else f"{multiplier.mean:.3f} ± {multiplier.deviation:.3f}",
        "near_zero": "" if multiplier is None else f"{multiplier.near_zero:.1%}",
        "near_one": "" if multiplier is None else f"{multiplier.near_one:.1%}",
        "gain": ""
        if gain is None
        else f"{gain.mean:.2f}, {gain.percentile_99:.2f}, {gain.maximum:.2f}",
        "norms": f"{found.raw_norm:.4g} → {found.excited_norm:.4g}",
        "start": ", ".join(f"{distance:.1%}" for distance in distances if distance is not None),
        "verdict": found.verdict,
    }


def _bars(histogram: Sequence[int]) -> list[dict[str, str]]:
    highest = max(max(histogram), 1)
    return [
        {
            "x": f"{1 + 6 * index}",
            "y": f"{33 - 32 * count / highest:.1f}",
            "height": f"{32 * count / highest:.1f}",
        }
        for index, count in enumerate(histogram)
        if count
    ]


def _costs(files: Sequence[Inspection]) -> list[dict[str, Any]]:
    largest = max((file.values for file in files), default=1) or 1
    rows = []
    for file in files:
        multiply_adds = sum(layer.statistics.multiply_adds for layer in file.layers)
        named = f"{file.source}: " if len(files) > 1 else ""
        kinds = [
            ("in training" if file.layers else "vanilla", file.values, file.size, multiply_adds)
        ]
        if file.layers:
            kinds.append(("after strip", file.stripped_values, file.stripped_size, 0))
        for name, values, size, work in kinds:
            kept = min(values, file.stripped_values)
            rows.append(
                {
                    "name": named + name,
                    "values": values,
                    "size": _bytes(size),
                    "multiply_adds": work,
                    "width": f"{_BAR * kept / largest:.1f}",
                    "added_width": f"{_BAR * (values - kept) / largest:.1f}"
                    if values > kept
                    else "",
                    "color": "#1b3a6b",
                    "share_text": f"{values:,} values",
                }
            )
    return rows


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e4 else f"{size:,} bytes"


def _comparison(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for weight in found.weights:
        statistics = [None if w is None else w.statistics.multiplier for w in weight.weights]
        rows.append(
            {
                "name": weight.name,
                "cells": [
                    {"mean": "", "deviation": ""}
                    if one is None
                    else {"mean": f"{one.mean:.3f}", "deviation": f"{one.deviation:.3f}"}
                    for one in statistics
                ],
                "correlation": "" if weight.correlation is None else f"{weight.correlation:.2f}",
                "distance": "" if weight.distance is None else f"{weight.distance:.1%}",
            }
        )
    return rows


def _plan(file: Inspection) -> dict[str, Any] | None:
    if file.plan is None:
        return None
    try:
        plan = Plan.from_dict(file.plan, file.source)
    except InputError:  # of another version: the page is worth having without it
        return None
    rows = [
        {
            "layer": row.layer or "(the model itself)",
            "kind": f"{row.kind} g{row.groups}" if row.groups > 1 else row.kind,
            "shape": " x ".join(map(str, row.shape)),
            "verdict": row.verdict,
            "skipped": not row.excitation,
            "reason": row.reason,
            "added": f"{row.added_parameters:,}" if row.added_parameters else "",
        }
        for row in plan.decisions
    ]
    summary = (
        f"{len(plan.excited)} of {len(plan.decisions)} weights excited; how the model was read: "
        f"{plan.read_by}" + (f" ({plan.read_by_reason})" if plan.read_by_reason else "") + "."
    )
    return {"rows": rows, "summary": summary}


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
