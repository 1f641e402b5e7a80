"""A model measured again and again, each time with other weights at zero.

With a function of the user's as the metric, each change costs a whole call of it. With a
labelled loader the changes take turns on each batch instead: the loader is gone through once,
all changes see the same batches, and what a batch computes before it reaches the changed layer
is computed once for all changes of that layer (:mod:`we_surgery.analysis.prefix`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.scripted import is_scripted
from we_surgery.analysis.by_batches import by_batches
from we_surgery.analysis.changes import BASELINE, Change, Monitor, Run
from we_surgery.analysis.decimation import measured_without
from we_surgery.analysis.progress_file import ProgressFile, fingerprint, fingerprint_of_model
from we_surgery.analysis.scores import (
    Metric,
    MetricFunction,
    check_score,
)
from we_surgery.errors import InputError


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
    run = Run(model, changes, ProgressFile(path, description), monitor)
    start = time.perf_counter()
    if callable(metric):
        baseline, values = _by_function(run, metric)
    else:
        baseline, values = by_batches(run, metric, score, share_prefixes)
    run.progress.remove()
    seconds = time.perf_counter() - start
    return Measured(baseline, values, label, run.evaluations, run.resumed, run.shared, seconds)


def _by_function(run: Run, metric: MetricFunction) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    baseline = _value(run.model, metric)
    seconds = time.perf_counter() - start
    if BASELINE not in run.progress:
        run.progress.add(BASELINE, baseline)
    elif not math.isclose(run.progress[BASELINE], baseline, rel_tol=1e-6):
        raise InputError(
            f"the metric is {baseline!r} where the run to be resumed had "
            f"{run.progress[BASELINE]!r}",
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
