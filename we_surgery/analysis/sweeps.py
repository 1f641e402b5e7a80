"""Training runs: each variant with each seed, all from the same weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from we_surgery._util.progress import Progress
from we_surgery.analysis.measuring import Measuring, measure
from we_surgery.analysis.progress import ProgressFile
from we_surgery.analysis.results import Result, Row
from we_surgery.analysis.scores import Metric, score_name
from we_surgery.analysis.variants import Variant
from we_surgery.analysis.weights import sparsity
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip
from we_surgery.errors import InputError, SurgeryError

MakeModel = Callable[[], nn.Module]
"""Makes the vanilla model, drawing its weights from torch's global generator."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Result):
    """The result of :func:`~we_surgery.analysis.sweep`.

    Each row is one training run: ``variant``, ``seed``, ``strength`` if there are several,
    ``metric``, ``sparsity`` (the share of zeros after strip), ``failure``, and ``difference``, to
    the baseline's run of the same seed and strength. The numbers are None where training failed.

    Attributes:
        title: what was varied.
        score: what was measured.
        baseline: the variant that the others are compared with.
    """

    analysis: str = "sensitivity"
    title: str
    score: str
    baseline: str

    def summary(self) -> list[Row]:
        """Per variant and strength: means, and the 95 % interval of the mean paired difference.

        The interval is Student's, from ``low`` to ``high``; both are None for fewer than two pairs.
        """
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row["variant"], row.get("strength")), []).append(row)
        return [_summarized(rows) for rows in groups.values()]


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among the values, None if there are none."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def _summarized(rows: Sequence[Row]) -> Row:
    pairs = [row["difference"] for row in rows if row["difference"] is not None]
    difference = mean_of(pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    low = high = None
    if difference is not None and error is not None:
        reach = _student_quantile(len(pairs) - 1) * error
        low, high = difference - reach, difference + reach
    return {
        **{key: rows[0][key] for key in ("variant", "strength") if key in rows[0]},
        "runs": len(rows),
        "failed": sum(row["metric"] is None for row in rows),
        "mean": mean_of(row["metric"] for row in rows),
        "sparsity": mean_of(row["sparsity"] for row in rows),
        "difference": difference,
        "standard_error": error,
        "low": low,
        "high": high,
    }


def _student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / (4 * freedom)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def sweep(
    make_model: MakeModel,
    variants: Mapping[str, Variant],
    train_fn: Callable[..., object],
    metric: Metric,
    *,
    strengths: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    title: str = "variants",
    **measuring: Unpack[Measuring],
) -> Sweep:
    """Trains each variant with each seed and measures the models as they would be deployed.

    Runs of one seed are paired: before each the global generator is seeded the same, so all
    variants start from the same vanilla weights, and ``train_fn`` gets the same seed. The state of
    torch's generator is restored afterwards.

    ``strengths`` are for training that makes models sparse. Supplement, section 3:
    WideResNet-16-8 keeps 11 % of its weights with Dynamic Sparse Training, and 10 % with LWE as
    well.

    Args:
        make_model: makes a vanilla model.
        variants: by name; the others are compared with the first.
        train_fn: ``train_fn(model, seed)`` trains a model in place; with ``strengths``,
            ``train_fn(model, seed, strength)``.
        metric: ``metric_fn(model) -> float`` of the stripped model, or a labelled loader.
        strengths: of a term of the loss, such as ``strength * ws.sparsity_loss(model)``; each
            variant is trained at each of them.
        seeds: one run each.
        title: of the table and picture.
        **measuring: as in :func:`~we_surgery.analysis.magnitude_curve`; ``progress_file`` stores
            finished runs, and ``progress`` counts them.

    Raises:
        InputError: there is nothing to vary, or the metric cannot be used.

    A model whose weights are not finite after training, or whose metric is not, gives a row that
    says so.
    """
    score = measuring.get("score", "accuracy")
    label = score_name(metric, score)

    def train(variant: str, seed: int, **strength: float) -> Row:
        arguments = (seed, *strength.values())
        model = trained(make_model, variants[variant], lambda m: train_fn(m, *arguments), seed)
        try:
            deployed = strip(model) if is_converted(model) else model
        except SurgeryError as error:
            return {"metric": None, "sparsity": None, "failure": error.cause}
        value = measure("", deployed, (), metric, score=score).baseline
        if not math.isfinite(value):
            return {"metric": None, "sparsity": None, "failure": f"the metric is {value}"}
        return {"metric": value, "sparsity": sparsity(deployed), "failure": ""}

    levels: list[Row] = [{}] if strengths is None else [{"strength": s} for s in strengths]
    # A whole seed after the other, so that what is there of a stopped sweep is paired.
    runs = [{"variant": v, "seed": s, **level} for s in seeds for v in variants for level in levels]
    job = {"analysis": "sensitivity", "title": title, "variants": list(variants), "score": label}
    rows = all_runs(runs, train, job, measuring.get("progress_file"), measuring.get("progress"))
    baseline = next(iter(variants))
    pairs = {(r["seed"], r.get("strength")): r["metric"] for r in rows if r["variant"] == baseline}
    for row in rows:
        values = row["metric"], pairs[row["seed"], row.get("strength")]
        row["difference"] = None if None in values else values[0] - values[1]
    return Sweep(rows=rows, title=title, score=label, baseline=baseline)


def all_runs(
    runs: Sequence[Row],
    train: Callable[..., Row],
    job: Mapping[str, Any],
    progress_file: str | Path | None,
    progress: Progress | None,
) -> list[Row]:
    """Each run with what ``train`` returned for it; finished runs come from the progress file."""
    if not runs:
        raise InputError(
            "there is nothing to train: no variant, seed or strength", "Give at least one of each."
        )
    kept = ProgressFile(progress_file, job)
    todo = [run for run in runs if str(run) not in kept]
    for done, run in enumerate(todo):
        if progress is not None:
            progress(done, len(todo))
        kept.add(str(run), train(**run))
    if progress is not None:
        progress(len(todo), len(todo))
    kept.remove()
    return [{**run, **kept[str(run)]} for run in runs]


def trained(
    make_model: MakeModel, variant: Variant, train: Callable[[nn.Module], object], seed: int
) -> nn.Module:
    """A trained variant of a new model; restores the state of the global generator."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = make_model()
        # Again: a variant may draw before others do.
        torch.manual_seed(seed)
        model = variant(model)
        train(model)
    return model
