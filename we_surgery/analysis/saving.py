"""A measurement on disk: JSON and CSV beside the picture."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from we_surgery.analysis.pictures import check_pictures, render
from we_surgery.analysis.results import Result
from we_surgery.checkpoint import check_target, write_bytes

PICTURES = ("png", "svg")


def _result_files(stem: str | Path, *, picture: bool) -> list[Path]:
    path = Path(stem)
    kinds = ("json", "csv", *(PICTURES if picture else ()))
    return [path.with_name(f"{path.name}.{kind}") for kind in kinds]


def check_result(stem: str | Path, *, picture: bool = True, force: bool = False) -> None:
    """Checks before a long run that its result can be saved."""
    for path in _result_files(stem, picture=picture):
        check_target(path, force=force)
    if picture:
        check_pictures()


def save_result(
    result: Result, stem: str | Path, *, picture: bool = True, force: bool = False
) -> list[Path]:
    """Writes the result of an analysis.

    Args:
        result: of any analysis.
        stem: the files' common name, such as ``out/location``.
        picture: also as PNG and SVG, which needs matplotlib.
        force: overwrite files that exist.

    Returns:
        The files.

    Raises:
        InputError: as :func:`check_result`; nothing was written then.
        SurgeryError: writing failed.
    """
    check_result(stem, picture=picture, force=force)
    contents = {
        "json": (to_json(result.to_dict()) + "\n").encode(),
        "csv": _csv(result).encode(),
    }
    if picture:
        contents |= {kind: render(result, kind) for kind in PICTURES}
    paths = _result_files(stem, picture=picture)
    for path in paths:
        write_bytes(contents[path.suffix[1:]], path, force=force)
    return paths


def to_json(value: Any) -> str:
    """JSON text in which numbers that JSON does not have are null."""
    return json.dumps(_finite(value), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _csv(result: Result) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(result.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    return buffer.getvalue()
