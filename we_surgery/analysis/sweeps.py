"""Sweeps that train: each variant with each seed, measured as it would be deployed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from we_surgery._util.progress import Progress
from we_surgery.analysis.measuring import measure
from we_surgery.analysis.progress import ProgressFile
from we_surgery.analysis.run_results import SparseRow, SparseTraining, Sweep, SweepRow
from we_surgery.analysis.scores import Metric, check_score
from we_surgery.analysis.variants import Variant
from we_surgery.analysis.weights import find_weights
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip
from we_surgery.errors import InputError, SurgeryError

MakeModel = Callable[[], nn.Module]
"""Makes the vanilla model, drawing its weights from torch's global generator."""

TrainFunction = Callable[[nn.Module, int], object]
"""Trains a model in place, with a seed for whatever is random in that."""

SparseTrainFunction = Callable[[nn.Module, int, float], object]
"""The same, with the strength of what makes the model sparse."""


def sweep(
    make_model: MakeModel,
    variants: Mapping[str, Variant],
    train_fn: TrainFunction,
    metric: Metric,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    title: str = "variants",
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Trains each variant with each seed and measures the models as they would be deployed.

    Runs of one seed are paired: before each the global generator is seeded the same, so all
    variants start from the same vanilla weights, and ``train_fn`` gets the same seed. The state of
    torch's generator is restored afterwards.

    Args:
        make_model: makes a vanilla model.
        variants: by name; the others are compared with the first.
        train_fn: trains a model in place.
        metric: ``metric_fn(model) -> float`` of the stripped model, or a labelled loader.
        seeds: one run each.
        title: of the table and picture.
        score: of a loader.
        progress_file: keeps finished runs, and resumes from them.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: there is nothing to vary, or the metric cannot be used.

    A model whose weights are not finite after training, or whose metric is not, gives a row that
    says so.
    """
    if not variants or not seeds:
        raise InputError("there is no variant or no seed", "Give at least one of each.")

    def train(name: str, seed: int) -> tuple[float | None, str]:
        model = trained(make_model, variants[name], lambda m: train_fn(m, seed), seed)
        try:
            deployed = _deployed(model)
        except SurgeryError as error:
            return None, error.cause
        value = measure(deployed, (), metric, score=score).baseline
        return (value, "") if math.isfinite(value) else (None, f"the metric is {value}")

    # A whole seed after the other, so that what is there of a stopped sweep is paired.
    runs = {f"{seed}:{name}": (name, seed) for seed in seeds for name in variants}
    job = {"analysis": "sensitivity", "title": title, "variants": list(variants)}
    found = all_runs(runs, train, job, score, progress_file, progress)
    rows = []
    for key, (name, seed) in runs.items():
        value, failure = found[key]
        rows.append(SweepRow(name, seed, value, failure=failure))
    baseline = next(iter(variants))
    of_baseline = {row.seed: row.metric for row in rows if row.variant == baseline}
    paired = [replace(row, difference=_difference(row, of_baseline[row.seed])) for row in rows]
    return Sweep(title, _label(metric, score), baseline, paired)


def sparse_training(
    make_model: MakeModel,
    variants: Mapping[str, Variant],
    train_fn: SparseTrainFunction,
    metric: Metric,
    *,
    strengths: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> SparseTraining:
    """Trains each variant at each strength, strips it, and counts zeros beside the metric.

    Supplement, section 3: WideResNet-16-8 keeps 11 % of its weights with Dynamic Sparse Training,
    and 10 % with LWE as well. Runs are paired by seed as in
    :func:`~we_surgery.analysis.sweep`.

    Args:
        make_model: makes a vanilla model.
        variants: by name; each makes the model sparse while it trains, as ``dynamic_sparse`` does.
        train_fn: trains a model in place; the strength is for its loss, such as
            ``loss + strength * ws.sparsity_loss(model)``.
        metric: of the stripped model.
        strengths: what ``train_fn`` gets.
        seeds: one run each.
        score: of a loader.
        progress_file: keeps finished runs, and resumes from them.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: there is nothing to train, or the metric cannot be used.
        SurgeryError: weights are not finite after training.
    """
    if not variants or not seeds or not strengths:
        raise InputError("there is no variant, strength or seed", "Give at least one of each.")

    def train(name: str, strength: float, seed: int) -> tuple[float, float]:
        model = trained(make_model, variants[name], lambda m: train_fn(m, seed, strength), seed)
        deployed = _deployed(model)
        return sparsity_of(deployed), measure(deployed, (), metric, score=score).baseline

    runs = {
        f"{seed}:{strength!r}:{name}": (name, strength, seed)
        for seed in seeds
        for name in variants
        for strength in strengths
    }
    job = {"analysis": "sparse_training", "variants": list(variants)}
    found = all_runs(runs, train, job, score, progress_file, progress)
    rows = [SparseRow(*run, *found[key]) for key, run in runs.items()]
    return SparseTraining(_label(metric, score), rows)


def sparsity_of(model: nn.Module) -> float:
    """The share of exact zeros among the conv and linear weights of a vanilla model."""
    weights = [weight.parameter for weight in find_weights(model, kinds="")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def all_runs(
    runs: Mapping[str, tuple[Any, ...]],
    train: Callable[..., Sequence[Any]],
    job: Mapping[str, Any],
    score: str,
    progress_file: str | Path | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """The result of ``train`` for each run; finished ones come from the progress file."""
    check_score(score)
    kept = ProgressFile(progress_file, {**job, "score": score})
    todo = [key for key in runs if key not in kept]
    for done, key in enumerate(todo):
        if progress is not None:
            progress(done, len(todo))
        kept.add(key, train(*runs[key]))
    if progress is not None:
        progress(len(todo), len(todo))
    kept.remove()
    return {key: kept[key] for key in runs}


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


def _deployed(model: nn.Module) -> nn.Module:
    return strip(model) if is_converted(model) else model


def _difference(row: SweepRow, baseline: float | None) -> float | None:
    return None if row.metric is None or baseline is None else row.metric - baseline


def _label(metric: Metric, score: str) -> str:
    return "metric_fn" if callable(metric) else score
