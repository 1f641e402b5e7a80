"""What analyses return: rows of numbers and text, as JSON types."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from we_surgery.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an analysis.

    Attributes:
        analysis: the name of the analysis.
        rows: numbers and text of each measurement, one dict per row of a table.
    """

    analysis: str
    rows: list[Row]

    def summary(self) -> list[Row]:
        """The rows to show to a reader."""
        return self.rows

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        summary = self.summary()
        return asdict(self) | ({} if summary is self.rows else {"summary": summary})


class KernelMap(NamedTuple):
    """D of the sampled kernels of one layer, ``[out_channels][in_channels]``."""

    out_channels: list[int]
    in_channels: list[int]
    drops: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Ablation(Result):
    """The metric of one model with some of its weights set to zero, a row for each choice of them.

    Each row says what was set to zero, then has ``metric`` and ``drop``: D, the baseline minus the
    metric. ``sparsity`` is the share of zeros among the weights of the layers, and
    ``model_sparsity`` that among all parameters, without the zeros that were there before.

    Attributes:
        score: what was measured: a score's name, or ``metric_fn``.
        baseline: the metric of the unchanged model.
        layers: the names of the measured layers.
    """

    score: str
    baseline: float
    layers: list[str]

    def mean_drop(self, **what: object) -> float:
        """The mean D of the rows with these entries; NaN if there is none.

        With ``granularity="channel", end="lowest"`` it is D_L of the paper.
        """
        drops = [row["drop"] for row in self.rows if what.items() <= row.items()]
        return statistics.fmean(drops) if drops else float("nan")

    def kernel_maps(self) -> dict[str, KernelMap]:
        """The map of each layer, of a result of :func:`~we_surgery.analysis.location_maps`."""
        maps = {}
        for layer in self.layers:
            own = [row for row in self.rows if row["layer"] == layer]
            drops = {(row["out_channel"], row["in_channel"]): float(row["drop"]) for row in own}
            outputs, inputs = (sorted({kernel[axis] for kernel in drops}) for axis in (0, 1))
            maps[layer] = KernelMap(
                outputs,
                inputs,
                [[drops[output, channel] for channel in inputs] for output in outputs],
            )
        return maps

    @staticmethod
    def read_location_maps(data: Any, source: str = "the file") -> Ablation:
        """The inverse of :meth:`to_dict`, for a result of ``location_maps``.

        Raises:
            InputError: the data is something else.
        """
        try:
            found = Ablation(**data)
            if found.analysis != "location":
                raise ValueError(f"it is of the analysis {found.analysis!r}")
            found.kernel_maps()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source} does not hold importance maps: {error}",
                "Give the JSON file that `we-surgery analyse location` wrote.",
            ) from error
        return found
