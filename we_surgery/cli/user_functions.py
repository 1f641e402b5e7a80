"""Functions that a user names on the command line, such as ``my_project.data:test_loader``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from we_surgery._util.imports import imported, working_folder_importable
from we_surgery.errors import InputError

_LOADER_CURE = (
    "Name an iterable of (inputs, labels), or a function without arguments that returns one."
)


def imported_metric(metric: str | None, loader: str | None) -> Any:
    """The metric of ``--metric`` or the batches that the function of ``--loader`` returns."""
    if (metric is None) == (loader is None):
        raise InputError(
            "an analysis needs exactly one of --loader and --metric",
            "Give --loader package.module:function, a function that returns an iterable of "
            "(inputs, labels), or --metric package.module:function, which takes a model and "
            "returns a number.",
        )
    if metric is not None:
        found = imported("--metric", metric)
        if not callable(found):
            raise InputError(
                f"--metric {metric} is {type(found).__name__}, not a function",
                "Name a function that takes a model and returns a number.",
            )
        return found
    assert loader is not None
    found = imported("--loader", loader)
    batches = found
    if callable(found):
        try:
            with working_folder_importable():
                batches = found()
        except Exception as error:
            raise InputError(
                f"--loader {loader} fails: {type(error).__name__}: {error}", _LOADER_CURE
            ) from error
    if callable(batches) or not isinstance(batches, Iterable):
        raise InputError(
            f"--loader {loader} returned {type(batches).__name__}, not batches", _LOADER_CURE
        )
    return batches
