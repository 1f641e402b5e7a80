"""One page about one or several files: no network, no script, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from we_surgery._util.version import __version__
from we_surgery.analysis.learned import LEARNED_NOTHING, learned_nothing
from we_surgery.analysis.results import Ablation
from we_surgery.errors import InputError
from we_surgery.jobs.inspect import Comparison, Inspection
from we_surgery.planning.plans import Plan

_BAR = 220
_CELL = 22
# Of ColorBrewer's RdBu; between them it is interpolated.
_BLUE, _WHITE, _RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def html_report(found: Inspection | Comparison, maps: Ablation | None = None) -> str:
    """The HTML page about one or several files, with importance maps."""
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
        heads=[_head(file) for file in files],
        plans=[_plan(file) for file in files],
        costs=_costs(files),
        comparison=found if isinstance(found, Comparison) else None,
        maps=None if maps is None else _maps(maps),
        LEARNED_NOTHING=LEARNED_NOTHING,
    )


def _head(file: Inspection) -> dict[str, Any]:
    """The verdict as a word, a sign, a colour tone and a sentence."""
    verdicts = [layer.statistics.verdict for layer in file.layers]
    learned = verdicts.count("learned")
    if not verdicts:
        tone, sign, verdict = "plain", "○", "Vanilla"
    elif learned_nothing(verdicts):
        tone, sign, verdict = "bad", "✗", "Excitation has learned nothing"
    elif not learned:
        tone, sign, verdict = "plain", "○", "Excitation has nothing to learn"
    else:
        tone, sign, verdict = "good", "✓", "Excitation has learned"
    return {
        "file": file,
        "tone": tone,
        "sign": sign,
        "verdict": verdict,
        "sentence": _sentence(file, learned),
    }


def _sentence(file: Inspection, learned: int) -> str:
    architecture = f" of the architecture {file.architecture}" if file.architecture else ""
    what = f"{file.kind.replace('_', ' ')}{architecture} with {file.values:,} values"
    if not file.layers:
        return f"A {what}; none of its weights is excited."
    mode = f" in mode {file.mode}" if file.mode else ""
    form = "attached" if file.is_attached else "converted"
    added = file.values - file.stripped_values
    removed = "" if file.is_attached else f"; strip will remove {added:,} values"
    return (
        f"A {what}, {form}{mode}: {learned} of its {len(file.layers)} excited weights "
        f"{'has' if learned == 1 else 'have'} learned{removed}."
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


def _maps(maps: Ablation) -> dict[str, Any]:
    limit = max((abs(row["drop"]) for row in maps.rows), default=0.0) or 1.0
    return {
        "score": maps.score.replace("_", " "),
        "limit": f"{limit:.3g}",
        "scale": [diverging(step / 31.5 - 1) for step in range(64)],
        "maps": [
            {
                "layer": layer,
                "width": _CELL * len(one.in_channels),
                "height": _CELL * len(one.out_channels),
                "cells": [
                    {
                        "x": _CELL * column,
                        "y": _CELL * row,
                        "color": diverging(drop / limit),
                        "is_negative": drop < 0,
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
            for layer, one in maps.kernel_maps().items()
        ],
    }


def diverging(value: float) -> str:
    """The colour of a number from -1 to 1, white at 0, as ``#rrggbb``."""
    share = min(abs(value), 1.0)
    end = _BLUE if value < 0 else _RED
    mixed = (round(w + share * (e - w)) for w, e in zip(_WHITE, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
