"""What analyses of one model return: records, with rows for tables and CSV, and as JSON types."""

from __future__ import annotations

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
