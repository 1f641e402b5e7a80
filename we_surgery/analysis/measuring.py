"""Measuring one model repeatedly, each time with other weights set to zero.

All analyses of weights are this loop: changes times measurements. A measurement is one call of the
user's metric function, or one batch of a labelled loader; all changes see the same batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery._util.progress import Progress
from we_surgery._util.scripted import is_scripted
from we_surgery.analysis.progress import ProgressFile, fingerprint, fingerprint_of_model
from we_surgery.analysis.scores import (
    LabelledBatches,
    Metric,
    MetricFunction,
    check_score,
    class_scores,
    inputs_and_labels,
)
from we_surgery.converted.proof import eval_mode
from we_surgery.errors import InputError
from we_surgery.reading.running import call

Cells = Mapping[nn.Parameter, Tensor]
"""Which weights to set to zero: a bool mask of the shape of each Parameter."""

Measurement = Callable[[], tuple[float, int]]
"""Measures the model as it is: a sum, and what to divide it by."""

_BASELINE = ""
"""The name of no change."""


@dataclass(frozen=True)
class Change:
    """Weights to set to zero together; ``cells`` makes their masks only when they are needed."""

    name: str
    cells: Callable[[], Cells]


@dataclass(frozen=True)
class Measured:
    """The metric of the unchanged model and under each change, and what was measured."""

    score: str
    baseline: float
    values: dict[str, float]

    def drop(self, name: str) -> float:
        """D, the decrease of the metric (WE paper, section 3.1)."""
        return self.baseline - self.values[name]


def measure(
    model: nn.Module,
    changes: Sequence[Change],
    metric: Metric,
    *,
    score: str = "accuracy",
    job: Mapping[str, Any] | None = None,
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """The metric of ``model``, and its metric under each change.

    Args:
        model: a vanilla copy, whose weights change meanwhile.
        changes: what to set to zero.
        metric: ``metric_fn(model) -> float``, or a loader of ``(inputs, labels)``, run in eval
            mode without gradients and with a fixed seed.
        score: for a loader, ``accuracy`` or ``log_likelihood``.
        job: what a progress file must agree with, besides the model and the changes.
        progress_file: holds results during the run, resumes it, and is removed at its end.
        progress: called with (measurements done, measurements in all); the latter is 0 if a loader
            has no length.
    """
    check_score(score)
    label = "metric_fn" if callable(metric) else score
    kept = ProgressFile(
        progress_file,
        {
            **(job or {}),
            "score": label,
            "changes": fingerprint([change.name for change in changes]),
            "model": fingerprint_of_model(model) if progress_file is not None else "",
        },
    )
    if callable(metric):
        measurements: Iterable[Measurement] = [lambda: (_value(model, metric), 1)]
        length = 1
    else:
        measurements, length = _batches(model, metric, score, kept), _length(metric)
    left = _left(changes, length, kept)
    index, done = -1, 0
    for index, measurement in enumerate(measurements):
        _measure_baseline(index, measurement, kept)
        if progress is not None and index == 0:
            progress(0, left)
        for change in changes:
            key = f"{index}:{change.name}"
            if key in kept:
                continue
            with _zeroed(change.cells()):
                kept.add(key, measurement())
            done += 1
            if progress is not None:
                progress(done, left)
    if index < 0:
        raise InputError("the loader gives no batch", "Give a loader of (inputs, labels).")
    values = {}
    for name in (_BASELINE, *(change.name for change in changes)):
        results = [kept[f"{number}:{name}"] for number in range(index + 1)]
        total = sum(count for _, count in results)
        values[name] = sum(value for value, _ in results) / total if total else float("nan")
    kept.remove()
    return Measured(label, values.pop(_BASELINE), values)


def _measure_baseline(index: int, measurement: Measurement, kept: ProgressFile) -> None:
    result, key = measurement(), f"{index}:{_BASELINE}"
    if key not in kept:
        kept.add(key, result)
    elif not math.isclose(kept[key][0], result[0], rel_tol=1e-6):
        raise InputError(
            f"the metric is {result[0]!r}, but was {kept[key][0]!r} in the run to be resumed",
            "Give the same data and metric, or remove the progress file.",
        )


def _left(changes: Sequence[Change], length: int, kept: ProgressFile) -> int:
    keys = (f"{index}:{change.name}" for index in range(length) for change in changes)
    return sum(key not in kept for key in keys)


@contextlib.contextmanager
def _zeroed(cells: Cells) -> Iterator[None]:
    before = [(parameter, parameter.detach().clone()) for parameter in cells]
    with torch.no_grad():
        for parameter, mask in cells.items():
            parameter.masked_fill_(mask.to(parameter.device), 0)
    yield
    with torch.no_grad():
        for parameter, values in before:
            parameter.copy_(values)


def _batches(
    model: nn.Module, batches: LabelledBatches, score: str, kept: ProgressFile
) -> Iterator[Measurement]:
    """A measurement for each batch of a loader; the loader runs once."""
    if not isinstance(batches, Iterable):
        raise InputError(
            f"the metric is a {type(batches).__name__}, not a function or a loader",
            "Give metric_fn(model) -> float, or an iterable of (inputs, labels).",
        )
    score_of = check_score(score)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for index, batch in enumerate(batches):
        inputs, labels = inputs_and_labels(batch, device)
        _check_batch(index, inputs, labels, kept)

        def measurement(inputs: Any = inputs, labels: Tensor = labels) -> tuple[float, int]:
            devices = [device] if device.type == "cuda" else []
            # A seed of its own, in case something in the model is random.
            with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                return score_of(class_scores(call(model, inputs)), labels)

        yield measurement


def _check_batch(index: int, inputs: Any, labels: Tensor, kept: ProgressFile) -> None:
    if kept.path is None:
        return
    key, found = f"batch {index}", fingerprint(inputs, labels)
    if key not in kept:
        kept.add(key, found)
    elif kept[key] != found:
        raise InputError(
            f"batch {index} differs from that of the run to be resumed",
            "Give a loader that does not shuffle or augment, or remove the progress file.",
        )


def _length(batches: LabelledBatches) -> int:
    """The number of batches, 0 where the loader does not say it."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _value(model: nn.Module, metric: MetricFunction) -> float:
    """The function's result; raises if it did not run the model."""
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in model.modules()
        if not is_scripted(module)
    ]
    try:
        value = metric(model)
    finally:
        for hook in hooks:
            hook.remove()
    if hooks and not ran:
        raise InputError(
            "metric_fn did not run the model it was given",
            "Use its argument: it is a copy, of a converted model a stripped one.",
        )
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metric_fn returned {type(value).__name__}, not a number",
            "Return one number of which more is better.",
        ) from error
