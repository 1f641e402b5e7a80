"""Training that makes its own zeros, and what they cost: Dynamic Sparse Training and its kin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from we_surgery.analysis.changes import Monitor
from we_surgery.analysis.kernels import find_weights
from we_surgery.analysis.measuring import measure
from we_surgery.analysis.progress_file import ProgressFile
from we_surgery.analysis.scores import Metric, check_score
from we_surgery.analysis.sensitivity import MakeModel, Variant
from we_surgery.converted.surgery import is_converted, strip
from we_surgery.errors import InputError

SparseTrainFunction = Callable[[nn.Module, int, float], object]
"""Trains a model in place, with a seed and the strength of what makes it sparse."""


@dataclass(frozen=True)
class SparseRow:
    """One training run.

    Attributes:
        variant: its name.
        strength: of the pull towards zeros.
        seed: of the run.
        sparsity: zeros among the conv and linear weights after strip.
        metric: of the stripped model.
    """

    variant: str
    strength: float
    seed: int
    sparsity: float
    metric: float


@dataclass(frozen=True)
class SparseTraining:
    """The result of :func:`sparse_training`.

    Attributes:
        score: what was measured.
        runs: a row for each variant, strength and seed.
    """

    score: str
    runs: list[SparseRow]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each run."""
        return (asdict(row) for row in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """The runs as JSON types."""
        return {"analysis": "sparse_training", **asdict(self)}


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
    monitor: Monitor | None = None,
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
        monitor: told of each finished run.

    Raises:
        InputError: there is nothing to train, or the metric cannot be used.
        SurgeryError: weights are not finite after training.
    """
    check_score(score)
    if not variants or not seeds or not strengths:
        raise InputError("there is no variant, strength or seed", "Give at least one of each.")
    keys = [(name, strength, seed) for seed in seeds for name in variants for strength in strengths]
    path = None if progress_file is None else Path(progress_file)
    job = {"analysis": "sparse_training", "score": score, "variants": list(variants)}
    progress = ProgressFile(path, job)
    if monitor is not None:
        monitor.start(len(keys), None)
    rows = []
    for name, strength, seed in keys:
        key = f"{seed}:{strength!r}:{name}"
        if key not in progress:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                model = make_model()
                torch.manual_seed(seed)
                model = variants[name](model)
                train_fn(model, seed, strength)
            model = strip(model) if is_converted(model) else model
            value = measure(model, [], metric, score=score).baseline
            progress.add(key, (sparsity_of(model), value))
        if monitor is not None:
            monitor.advance(1)
        rows.append(SparseRow(name, strength, seed, *progress[key]))
    progress.remove()
    return SparseTraining("metric_fn" if callable(metric) else score, rows)


def sparsity_of(model: nn.Module) -> float:
    """The share of exact zeros among the conv and linear weights of a vanilla model."""
    weights = [weight.parameter for weight in find_weights(model, kinds="")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)
