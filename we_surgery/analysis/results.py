"""What analyses return: plain records, with rows for tables and CSV, and as JSON types."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from we_surgery.errors import InputError


class Result:
    """The result of an analysis. Subclasses are frozen dataclasses.

    Attributes:
        analysis: the name of the analysis.
        score: what was measured: a score's name, or ``metric_fn``.
    """

    analysis: ClassVar[str]
    score: str

    @property
    def records(self) -> Sequence[Any]:
        """A dataclass for each measurement."""
        raise NotImplementedError

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row of numbers and text for each measurement."""
        return (asdict(record) for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {"analysis": self.analysis, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class MagnitudeCurve(Result):
    """The metric lost without the weight at each percentile of magnitude (Fig. 1a).

    Attributes:
        score: what was measured.
        baseline: the metric of the unchanged model.
        layers: the conv layers; one weight of each is zero at a time.
        positions: the percentiles b, 1 to 100.
        drops: D(b), the baseline minus the metric.
    """

    analysis = "magnitude"
    score: str
    baseline: float
    layers: list[str]
    positions: list[int]
    drops: list[float]

    def rows(self) -> Iterator[dict[str, Any]]:
        for position, drop in zip(self.positions, self.drops, strict=True):
            yield {"percentile": position, "metric": self.baseline - drop, "drop": drop}


@dataclass(frozen=True)
class LocationMap:
    """The sampled kernels of one layer.

    Attributes:
        layer: its name.
        shape: its weight's.
        out_channels: the filters sampled, N1 of them.
        in_channels: the input channels sampled of each, N2 of them.
        drops: ``[N1][N2]``, the metric lost without the kernel.
    """

    layer: str
    shape: tuple[int, ...]
    out_channels: list[int]
    in_channels: list[int]
    drops: list[list[float]]


@dataclass(frozen=True)
class LocationMaps(Result):
    """The metric lost without single kernels, layer by layer (Fig. 2).

    Attributes:
        score: what was measured.
        baseline: the metric of the unchanged model.
        maps: one for each layer, in the model's order.
    """

    analysis = "location"
    score: str
    baseline: float
    maps: list[LocationMap]

    def rows(self) -> Iterator[dict[str, Any]]:
        for one in self.maps:
            for output, drops in zip(one.out_channels, one.drops, strict=True):
                for channel, drop in zip(one.in_channels, drops, strict=True):
                    yield {
                        "layer": one.layer,
                        "out_channel": output,
                        "in_channel": channel,
                        "metric": self.baseline - drop,
                        "drop": drop,
                    }

    @staticmethod
    def from_dict(data: Any, source: str = "the file") -> LocationMaps:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: the data is something else.
        """
        try:
            if data["analysis"] != "location":
                raise ValueError(f"it is of the analysis {data['analysis']!r}")
            maps = [LocationMap(**{**one, "shape": tuple(one["shape"])}) for one in data["maps"]]
            return LocationMaps(str(data["score"]), float(data["baseline"]), maps)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source} does not hold importance maps: {error}",
                "Give the JSON file that `we-surgery analyse location` wrote.",
            ) from error


@dataclass(frozen=True)
class ValidityRow:
    """The metric without the kernels that one choice removed."""

    granularity: str
    end: str  # lowest, highest or random
    draw: int  # which random draw; 0 for the other two
    metric: float
    drop: float  # the baseline minus the metric: D_L, D_H, or that of a random choice
    sparsity: float  # the share of the measured layers' weights that were zero


@dataclass(frozen=True)
class MultiplierValidity(Result):
    """Whether kernels with a high multiplier matter more (WE paper, end of section 4.2).

    Attributes:
        score: what was measured.
        baseline: the metric of the stripped model.
        layers: the layers with multipliers.
        share: how much was removed of each layer; None for one unit of each.
        measurements: a row for each granularity, end and random draw.
    """

    analysis = "multipliers"
    score: str
    baseline: float
    layers: list[str]
    share: float | None
    measurements: list[ValidityRow]

    @property
    def records(self) -> Sequence[Any]:
        return self.measurements

    def drop(self, granularity: str, end: str) -> float:
        """D_L (``lowest``) or D_H (``highest``), or the mean over the random draws."""
        kind = (granularity, end)
        found = [row.drop for row in self.measurements if (row.granularity, row.end) == kind]
        return sum(found) / len(found) if found else float("nan")


@dataclass(frozen=True)
class PruningRow:
    """The metric without a share of the kernels of each layer, with no training after."""

    criterion: str
    share: float
    sparsity: float  # zeros among the pruned layers' weights that pruning made
    model_sparsity: float  # the same among all parameters of the stripped model
    metric: float
    drop: float  # the baseline minus the metric


@dataclass(frozen=True)
class PruningCurve(Result):
    """The metric after pruning kernels by each criterion.

    Attributes:
        score: what was measured.
        baseline: the metric of the stripped model.
        layers: the layers with multipliers, all of which are pruned.
        measurements: a row for each criterion and share.
    """

    analysis = "prune"
    score: str
    baseline: float
    layers: list[str]
    measurements: list[PruningRow]

    @property
    def records(self) -> Sequence[Any]:
        return self.measurements


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
        """For each variant its mean, its mean paired difference, and how certain that is.

        The standard error is that of the mean of the paired differences, in the metric's unit;
        ``low`` and ``high`` are the ends of Student's 95 % interval. All are None for fewer than
        two pairs.
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
class CurvePoint:
    """A weight, what a curve makes of it, and its gain ``dW'/dW``."""

    curve: str
    weight: float
    excited: float
    gain: float


@dataclass(frozen=True)
class CurveDrawing(Result):
    """The result of :func:`~we_surgery.analysis.curve_drawing`.

    Attributes:
        epsilon: of MWE.
        relative: whether the curves see W / M_A, or W itself.
        points: those of each curve.
    """

    analysis = "curve"
    epsilon: float
    relative: bool
    points: list[CurvePoint]

    @property
    def records(self) -> Sequence[Any]:
        return self.points

    def summary(self) -> list[dict[str, Any]]:
        """For each curve its range and the least and the largest gain."""
        found = []
        for name in dict.fromkeys(point.curve for point in self.points):
            own = [point for point in self.points if point.curve == name]
            row: dict[str, Any] = {"curve": name}
            for what in ("excited", "gain"):
                values = [getattr(point, what) for point in own]
                row |= {f"least_{what}": min(values), f"largest_{what}": max(values)}
            found.append(row)
        return found


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
        """How far the validation metric moves per epoch, less what it gains by it.

        The mean of ``|v[t+1] - v[t]|`` minus that of ``v[t+1] - v[t]``: 0 for a curve that never
        falls.
        """
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
        """For each variant the means of these figures over its runs, and how many reached the goal.

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
