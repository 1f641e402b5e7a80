"""A model measured again and again, each time with other weights at zero.

With a function of the user's as the metric, each change costs a whole call of it. With a
labelled loader the changes take turns on each batch instead: the loader is gone through once,
all changes see the same batches, and what a batch computes before it reaches the changed layer
is computed once for all changes of that layer (:mod:`we_surgery.analysis.prefix`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from we_surgery.analysis.decimation import Cells, measured_without
from we_surgery.analysis.kernels import MeasuredWeight
from we_surgery.analysis.prefix import Beginnings, Prefix
from we_surgery.analysis.progress_file import ProgressFile, fingerprint, fingerprint_of_model
from we_surgery.analysis.scores import (
    LabelledBatches,
    Metric,
    MetricFunction,
    check_score,
    class_scores,
    inputs_and_labels,
)
from we_surgery.errors import InputError
from we_surgery.proof import eval_mode
from we_surgery.reading.running import call
from we_surgery.scripted import is_scripted

logger = logging.getLogger(__name__)

_BASELINE = ""
"""The name of no change."""


class Monitor(Protocol):
    """What wants to know how a long run gets on; see :func:`we_surgery.analysis.progress_bar`."""

    def start(self, evaluations: int | None, seconds: float | None) -> None:
        """Called before the first change: how much there is to do, and about how long it takes.

        Both are None where a loader does not say its length.
        """

    def advance(self, evaluations: int) -> None:
        """Called with the number of evaluations that were just done."""


@dataclass(frozen=True)
class Change:
    """Weights to set to zero together.

    Attributes:
        name: says which; unique in one run.
        weights: those that change.
        cells: makes the cells when they are needed; for many changes they would fill memory.
    """

    name: str
    weights: tuple[MeasuredWeight, ...]
    cells: Callable[[], Cells]


@dataclass(frozen=True)
class Measured:
    """The result of :func:`measure`.

    Attributes:
        baseline: the metric of the unchanged model.
        values: the metric by change.
        score: what was measured: a score's name, or ``metric_fn``.
        evaluations: evaluations run now, of the whole metric or of one batch.
        resumed: evaluations that an earlier run had done.
        shared: how many of them started from a prefix that was computed before.
        seconds: wall time.
    """

    baseline: float
    values: dict[str, float]
    score: str
    evaluations: int
    resumed: int
    shared: int
    seconds: float

    def drop(self, name: str) -> float:
        """D, the decrease of the metric (WE paper, section 3.1)."""
        return self.baseline - self.values[name]


@dataclass
class _Run:
    model: nn.Module
    changes: Sequence[Change]
    progress: ProgressFile
    monitor: Monitor | None
    evaluations: int = 0
    resumed: int = 0
    shared: int = 0
    totals: dict[str, list[float]] = field(default_factory=dict)

    def todo(self, key: Callable[[Change], str]) -> list[Change]:
        return [change for change in self.changes if key(change) not in self.progress]

    def begin(self, evaluations: int | None, seconds: float | None) -> None:
        if seconds is not None:
            logger.info("%s evaluations, about %.0f s", evaluations, seconds)
        if self.monitor is not None:
            self.monitor.start(evaluations, seconds)

    def done(self, key: str, value: Any, shared: bool = False) -> None:
        self.progress.add(key, value)
        self.evaluations += 1
        self.shared += shared
        if self.monitor is not None:
            self.monitor.advance(1)


def measure(
    model: nn.Module,
    changes: Sequence[Change],
    metric: Metric,
    *,
    score: str = "accuracy",
    job: Mapping[str, Any] | None = None,
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
    share_prefixes: bool = True,
) -> Measured:
    """The metric of ``model``, and its metric under each change.

    Args:
        model: a vanilla model; its weights change and come back bit for bit.
        changes: what to set to zero.
        metric: ``metric_fn(model) -> float``, or a loader of ``(inputs, labels)``, run in eval
            mode without gradients and with a fixed seed.
        score: for a loader, ``accuracy`` or ``log_likelihood``.
        job: what a progress file is checked against besides the model and the changes.
        progress_file: where results are kept while the run lasts, and taken up from if it is
            there already; removed at the end.
        monitor: told how the run gets on.
        share_prefixes: compute what lies before a changed layer once; False is for comparison.

    Raises:
        InputError: the metric is neither of the two, does not run the model, or does not give a
            number; the batches differ from those of the run to be resumed.
    """
    check_score(score)
    label = "metric_fn" if callable(metric) else score
    if len({change.name for change in changes}) < len(changes):
        raise InputError("two changes have one name", "Name each change once.")
    path = None if progress_file is None else Path(progress_file)
    description = {
        **(job or {}),
        "score": label,
        "changes": fingerprint([change.name for change in changes]),
        "model": fingerprint_of_model(model) if path is not None else "",
    }
    run = _Run(model, changes, ProgressFile(path, description), monitor)
    start = time.perf_counter()
    if callable(metric):
        baseline, values = _by_function(run, metric)
    else:
        baseline, values = _by_batches(run, metric, score, share_prefixes)
    run.progress.remove()
    seconds = time.perf_counter() - start
    return Measured(baseline, values, label, run.evaluations, run.resumed, run.shared, seconds)


def _by_function(run: _Run, metric: MetricFunction) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    baseline = _value(run.model, metric)
    seconds = time.perf_counter() - start
    if _BASELINE not in run.progress:
        run.progress.add(_BASELINE, baseline)
    elif not math.isclose(run.progress[_BASELINE], baseline, rel_tol=1e-6):
        raise InputError(
            f"the metric is {baseline!r} where the run to be resumed had "
            f"{run.progress[_BASELINE]!r}",
            "Give the same data and metric, or remove the progress file.",
        )
    todo = run.todo(lambda change: change.name)
    run.resumed = len(run.changes) - len(todo)
    run.begin(len(todo), len(todo) * seconds)
    for change in todo:
        value = measured_without(change.cells(), lambda: _value(run.model, metric))
        run.done(change.name, value)
    return baseline, {change.name: run.progress[change.name] for change in run.changes}


def _value(model: nn.Module, metric: MetricFunction) -> float:
    """What the function returns, if it ran the model it was given."""
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
            "Use its argument: of a converted model it is a stripped copy, not the model itself.",
        )
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metric_fn returned {type(value).__name__}, not a number",
            "Return one number of which more is better.",
        ) from error


def _by_batches(
    run: _Run, batches: LabelledBatches, score: str, share_prefixes: bool
) -> tuple[float, dict[str, float]]:
    if not isinstance(batches, Iterable):
        raise InputError(
            f"the metric is {type(batches).__name__}, neither a function nor a loader",
            "Give metric_fn(model) -> float, or an iterable of (inputs, labels).",
        )
    groups = _by_weights(run.changes)
    device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
    count = 0
    with eval_mode(run.model), torch.no_grad():
        for batch in batches:
            inputs, labels = inputs_and_labels(batch, device)
            _check_batch(run, count, inputs, labels)
            one = _Batch(run, count, inputs, labels, score)
            one.measure(groups, share_prefixes, is_first=not count, length=_length(batches))
            count += 1
    if not count:
        raise InputError("the loader gives no batch", "Give a loader of (inputs, labels).")
    means = {}
    for name in (_BASELINE, *(change.name for change in run.changes)):
        rows = [run.progress[_key(index, name)] for index in range(count)]
        total = sum(row[1] for row in rows)
        means[name] = sum(row[0] for row in rows) / total if total else float("nan")
    return means.pop(_BASELINE), means


class _Batch:
    """All changes on one batch."""

    def __init__(self, run: _Run, index: int, inputs: Any, labels: Tensor, score: str) -> None:
        self.of = run
        self.index = index
        self.inputs = inputs
        self.labels = labels
        self.score = check_score(score)

    def run(self) -> Tensor:
        """The model's class scores; with a seed of its own, in case something in it is random."""
        devices = [self.labels.device] if self.labels.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return class_scores(call(self.of.model, self.inputs))

    def measure(
        self,
        groups: Mapping[tuple[MeasuredWeight, ...], Sequence[Change]],
        share_prefixes: bool,
        *,
        is_first: bool,
        length: int | None,
    ) -> None:
        """Measures what the progress file does not have yet."""
        run = self.of
        beginnings = Beginnings(run.model, self.run)
        if is_first:  # once more: the first run of all is a slow one, and this is what is timed
            beginnings = Beginnings(run.model, self.run)
        key = _key(self.index, _BASELINE)
        if key not in run.progress:
            run.progress.add(key, self.score(beginnings.output, self.labels))
        shares = {
            weights: beginnings.share(_owners(weights)) if share_prefixes else 0.0
            for weights in groups
        }
        if is_first:
            left = sum((1 - shares[weights]) * len(group) for weights, group in groups.items())
            evaluations = len(run.changes) * length if length is not None else None
            seconds = left * length * beginnings.seconds if length is not None else None
            run.begin(evaluations, seconds)
        prefix: Prefix | None = None
        for weights, group in sorted(groups.items(), key=lambda item: shares[item[0]]):
            todo = [c for c in group if _key(self.index, c.name) not in run.progress]
            run.resumed += len(group) - len(todo)
            if run.monitor is not None and len(todo) < len(group):
                run.monitor.advance(len(group) - len(todo))
            # A prefix costs two runs: one to record it, one to check it.
            if shares[weights] * len(todo) > 2:
                prefix = self._with_prefix(weights, todo, prefix)
            else:
                for change in todo:
                    self._done(change, measured_without(change.cells(), self.run))

    def _with_prefix(
        self, weights: tuple[MeasuredWeight, ...], todo: Sequence[Change], before: Prefix | None
    ) -> Prefix | None:
        """Measures all changes of one group of weights; returns the prefix they shared."""
        prefix: Prefix | None = None
        try:
            prefix = Prefix.recorded(self.of.model, _owners(weights), self.run, before)
        except Exception as error:  # modules that cannot be watched, of which we know nothing
            logger.debug("no prefix: %s", error)
        cells = todo[0].cells()
        whole = measured_without(cells, self.run)
        self._done(todo[0], whole)
        if prefix is not None and not self._agrees(prefix, cells, whole):
            logger.debug("the prefix up to %s is not used", weights[0].name)
            prefix = None
        run = self.run if prefix is None else partial(prefix.run, self.run)
        for change in todo[1:]:
            cells = change.cells()
            outputs = measured_without(cells, run)
            # Not a number: perhaps something that was let go as unread.
            is_shared = prefix is not None and not bool(outputs.isnan().any())
            if prefix is not None and not is_shared:
                outputs = measured_without(cells, self.run)
            self._done(change, outputs, is_shared)
        return prefix

    def _agrees(self, prefix: Prefix, cells: Cells, whole: Tensor) -> bool:
        try:
            return measured_without(cells, lambda: prefix.agrees(self.run, whole))
        except Exception as error:
            logger.debug("no prefix: %s", error)
            return False

    def _done(self, change: Change, outputs: Tensor, shared: bool = False) -> None:
        result = self.score(outputs, self.labels)
        self.of.done(_key(self.index, change.name), result, shared)


def _check_batch(run: _Run, index: int, inputs: Any, labels: Tensor) -> None:
    if run.progress.path is None:
        return
    key, found = f"batch {index}", fingerprint(inputs, labels)
    if key not in run.progress:
        run.progress.add(key, found)
    elif run.progress[key] != found:
        raise InputError(
            f"batch {index} is not the one that the run to be resumed had",
            "Give a loader that does not shuffle or augment, or remove the progress file.",
        )


def _by_weights(
    changes: Sequence[Change],
) -> dict[tuple[MeasuredWeight, ...], list[Change]]:
    groups: dict[tuple[MeasuredWeight, ...], list[Change]] = {}
    for change in changes:
        groups.setdefault(change.weights, []).append(change)
    return groups


def _owners(weights: Iterable[MeasuredWeight]) -> list[nn.Module]:
    return [owner for weight in weights for owner in weight.owners]


def _length(batches: LabelledBatches) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _key(batch: int, change: str) -> str:
    return f"{batch}:{change}"
