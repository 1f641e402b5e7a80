"""What analyses of training runs return."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from we_surgery.analysis.results import Result


@dataclass(frozen=True)
class SweepRow:
    """One training run; its metric is None where training failed."""

    variant: str
    seed: int
    metric: float | None
    difference: float | None = None  # to the baseline's run of the same seed
    failure: str = ""


@dataclass(frozen=True)
class Sweep(Result):
    """The result of :func:`~we_surgery.analysis.sweep`.

    Attributes:
        title: what was varied.
        score: what was measured.
        baseline: the variant that the others are compared with.
        runs: a row for each variant and seed.
    """

    analysis = "sensitivity"
    title: str
    score: str
    baseline: str
    runs: list[SweepRow]

    @property
    def records(self) -> Sequence[Any]:
        return self.runs

    def summary(self) -> list[dict[str, Any]]:
        """Per variant: mean, mean paired difference, its standard error and 95 % interval.

        The interval is Student's, from ``low`` to ``high``; all are None for fewer than two pairs.
        """
        found = []
        for variant in dict.fromkeys(row.variant for row in self.runs):
            own = [row for row in self.runs if row.variant == variant]
            metrics = [row.metric for row in own if row.metric is not None]
            pairs = [row.difference for row in own if row.difference is not None]
            error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
            difference = statistics.fmean(pairs) if pairs else None
            low = high = None
            if difference is not None and error is not None:
                reach = _student_quantile(len(pairs) - 1) * error
                low, high = difference - reach, difference + reach
            found.append(
                {
                    "variant": variant,
                    "runs": len(own),
                    "failed": len(own) - len(metrics),
                    "mean": statistics.fmean(metrics) if metrics else None,
                    "difference": difference,
                    "standard_error": error,
                    "low": low,
                    "high": high,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "summary": self.summary()}


def _student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / (4 * freedom)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class SparseRow:
    """One training run."""

    variant: str
    strength: float  # of the pull towards zeros
    seed: int
    sparsity: float  # zeros among the conv and linear weights after strip
    metric: float


@dataclass(frozen=True)
class SparseTraining(Result):
    """The result of :func:`~we_surgery.analysis.sparse_training`.

    Attributes:
        score: what was measured.
        runs: a row for each variant, strength and seed.
    """

    analysis = "sparse_training"
    score: str
    runs: list[SparseRow]

    @property
    def records(self) -> Sequence[Any]:
        return self.runs


@dataclass(frozen=True)
class LearningRow:
    """The learning curves of one run, an entry for each epoch."""

    variant: str
    seed: int
    training: list[float]
    validation: list[float]

    @property
    def gap(self) -> float:
        """The training metric minus the validation metric after the last epoch."""
        return self.training[-1] - self.validation[-1]

    @property
    def roughness(self) -> float:
        """The mean of ``|v[t+1] - v[t]|`` minus that of ``v[t+1] - v[t]``: 0 if it never falls."""
        steps = [b - a for a, b in itertools.pairwise(self.validation)]
        return sum(abs(step) - step for step in steps) / len(steps) if steps else 0.0

    def epochs_to(self, goal: float) -> int | None:
        """The first epoch, from 1, with that validation metric; None if it was not reached."""
        reached = (n for n, value in enumerate(self.validation, 1) if value >= goal)
        return next(reached, None)


@dataclass(frozen=True)
class LearningCurves(Result):
    """The result of :func:`~we_surgery.analysis.learning_curves`.

    Attributes:
        score: what was measured.
        goal: the validation metric whose epoch is given; None for none.
        runs: a row for each variant and seed.
    """

    analysis = "learning_curves"
    score: str
    goal: float | None
    runs: list[LearningRow]

    def rows(self) -> Iterator[dict[str, Any]]:
        for run in self.runs:
            yield {
                "variant": run.variant,
                "seed": run.seed,
                "validation": run.validation[-1],
                "gap": run.gap,
                "roughness": run.roughness,
                "epochs_to_goal": None if self.goal is None else run.epochs_to(self.goal),
            }

    def summary(self) -> list[dict[str, Any]]:
        """Per variant: means over its runs, and how many reached the goal.

        ``epochs_to_goal`` is the mean over the runs that reached it.
        """
        found = []
        rows = list(self.rows())
        for variant in dict.fromkeys(run.variant for run in self.runs):
            own = [row for row in rows if row["variant"] == variant]
            epochs = [row["epochs_to_goal"] for row in own if row["epochs_to_goal"] is not None]
            means = {
                name: statistics.fmean(row[name] for row in own)
                for name in ("validation", "gap", "roughness")
            }
            found.append(
                {
                    "variant": variant,
                    "runs": len(own),
                    **means,
                    "reached": len(epochs),
                    "epochs_to_goal": statistics.fmean(epochs) if epochs else None,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "summary": self.summary()}
