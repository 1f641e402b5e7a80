"""Changes that take turns on each batch of a labelled loader.

The loader is gone through once, all changes see the same batches, and what a batch computes
before it reaches the changed layer is computed once for all changes of that layer
(:mod:`we_surgery.analysis.prefix`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.analysis.changes import BASELINE, Change, Run
from we_surgery.analysis.decimation import Cells, measured_without
from we_surgery.analysis.kernels import MeasuredWeight
from we_surgery.analysis.prefix import Beginnings, Prefix
from we_surgery.analysis.progress_file import fingerprint
from we_surgery.analysis.scores import (
    LabelledBatches,
    check_score,
    class_scores,
    inputs_and_labels,
)
from we_surgery.converted.proof import eval_mode
from we_surgery.errors import InputError
from we_surgery.reading.running import call

logger = logging.getLogger(__name__)


def by_batches(
    run: Run, batches: LabelledBatches, score: str, share_prefixes: bool
) -> tuple[float, dict[str, float]]:
    """The score of the unchanged model, and its score under each change, over all batches.

    Args:
        run: the model, the changes, and what was measured before.
        batches: gives ``(inputs, labels)``; gone through once.
        score: as in :func:`~we_surgery.analysis.measuring.measure`.
        share_prefixes: as there.

    Raises:
        InputError: the loader is none, gives no batch, or others than those of the run to be
            resumed.
    """
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
    for name in (BASELINE, *(change.name for change in run.changes)):
        rows = [run.progress[_key(index, name)] for index in range(count)]
        total = sum(row[1] for row in rows)
        means[name] = sum(row[0] for row in rows) / total if total else float("nan")
    return means.pop(BASELINE), means


class _Batch:
    """All changes on one batch."""

    def __init__(self, run: Run, index: int, inputs: Any, labels: Tensor, score: str) -> None:
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
        key = _key(self.index, BASELINE)
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


def _check_batch(run: Run, index: int, inputs: Any, labels: Tensor) -> None:
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
