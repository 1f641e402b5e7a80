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
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from we_surgery._util.progress import Progress
from we_surgery._util.scripted import is_scripted
from we_surgery.analysis.progress import ProgressFile, fingerprint, fingerprint_of_model
from we_surgery.analysis.results import Ablation, Row
from we_surgery.analysis.scores import (
    SCORES,
    LabelledBatches,
    Metric,
    MetricFunction,
    class_scores,
    inputs_and_labels,
    score_name,
)
from we_surgery.converted.proof import eval_mode
from we_surgery.errors import InputError
from we_surgery.reading.running import call

Cells = Mapping[nn.Parameter, Tensor]
"""Which weights to set to zero: a bool mask of the shape of each Parameter."""

Measurement = Callable[[], tuple[float, int]]
"""Measures the model as it is: a sum, and what to divide it by."""

_BASELINE = ""
"""The key of no change."""


class Measuring(TypedDict, total=False):
    """Keyword arguments of all measurements.

    Attributes:
        score: of a loader: ``accuracy`` (default), or ``log_likelihood``, which changes even if no
            prediction does.
        progress_file: stores results during the run; an existing one is resumed. It is removed at
            the end.
        progress: called with (evaluations done, evaluations in all), as by the bar that
            :func:`we_surgery.analysis.progress_bar` gives; the latter is 0 if a loader has no
            length.
    """

    score: str
    progress_file: str | Path | None
    progress: Progress | None


@dataclass(frozen=True)
class Change:
    """Weights to set to zero together, and what they are, as the entries of a row.

    ``cells`` makes their masks only when they are needed.
    """

    what: Row
    cells: Callable[[], Cells]

    @property
    def key(self) -> str:
        return " ".join(map(str, self.what.values()))


def measure(
    analysis: str,
    model: nn.Module,
    changes: Sequence[Change],
    metric: Metric,
    *,
    layers: Sequence[str] = (),
    seed: int = 0,
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """The metric of ``model``, and its metric under each change.

    Args:
        analysis: its name; a progress file of another one is refused, as of other ``layers`` or
            another ``seed``.
        model: a vanilla copy, whose weights change meanwhile.
        changes: what to set to zero.
        metric: ``metric_fn(model) -> float``, or a loader of ``(inputs, labels)``, run in eval
            mode without gradients and with a fixed seed.
        layers: the names of those that are measured.
        seed: of what is random in the changes.
        score: as in :class:`Measuring`.
        progress_file: as there.
        progress: as there.
    """
    label = score_name(metric, score)
    job: dict[str, Any] = {"analysis": analysis, "layers": list(layers)}
    if progress_file is not None:
        job |= {"seed": seed, "score": label, "model": fingerprint_of_model(model)}
        job["changes"] = fingerprint([change.key for change in changes])
    kept = ProgressFile(progress_file, job)
    count = _measure_all(model, changes, metric, score, kept, progress)

    def mean(key: str) -> float:
        sums, counts = zip(*(kept[f"{index}:{key}"] for index in range(count)), strict=True)
        return sum(sums) / sum(counts) if sum(counts) else float("nan")

    baseline = mean(_BASELINE)
    values = [mean(change.key) for change in changes]
    kept.remove()
    rows = [
        {**change.what, "metric": value, "drop": baseline - value}
        for change, value in zip(changes, values, strict=True)
    ]
    return Ablation(
        analysis=analysis, rows=rows, score=label, baseline=baseline, layers=list(layers)
    )


def _measure_all(
    model: nn.Module,
    changes: Sequence[Change],
    metric: Metric,
    score: str,
    kept: ProgressFile,
    progress: Progress | None,
) -> int:
    """Takes the measurements that are not kept yet; returns the number of batches."""
    if callable(metric):
        measurements: Iterable[Measurement] = [lambda: (_value(model, metric), 1)]
        length = 1
    else:
        measurements, length = _batches(model, metric, score, kept), _length(metric)
    keys = [f"{index}:{change.key}" for index in range(length) for change in changes]
    left = sum(key not in kept for key in keys)
    count = done = 0
    for index, measurement in enumerate(measurements):
        count += 1
        _measure_baseline(index, measurement, kept)
        if progress is not None and index == 0:
            progress(0, left)
        for change in changes:
            key = f"{index}:{change.key}"
            if key in kept:
                continue
            with _zeroed(change.cells()):
                kept.add(key, measurement())
            done += 1
            if progress is not None:
                progress(done, left)
    if not count:
        raise InputError("the loader gives no batch", "Give a loader of (inputs, labels).")
    return count


def _measure_baseline(index: int, measurement: Measurement, kept: ProgressFile) -> None:
    result, key = measurement(), f"{index}:{_BASELINE}"
    if key not in kept:
        kept.add(key, result)
    elif not math.isclose(kept[key][0], result[0], rel_tol=1e-6):
        raise InputError(
            f"the metric is {result[0]!r}, but was {kept[key][0]!r} in the run to be resumed",
            "Give the same data and metric, or remove the progress file.",
        )


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
    score_of = SCORES[score]
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
