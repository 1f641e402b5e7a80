"""Which weights matter: by their magnitude, and by where they are (WE paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.analysis.changes import Change, Monitor
from we_surgery.analysis.kernels import (
    MeasuredWeight,
    as_deployed,
    equidistant,
    find_weights,
    kernel_cells,
)
from we_surgery.analysis.measuring import Measured, measure
from we_surgery.analysis.scores import Metric
from we_surgery.errors import InputError


@dataclass(frozen=True)
class MagnitudeCurve:
    """How much is lost without the weight at each percentile of magnitude (Fig. 1a).

    Attributes:
        score: what was measured.
        baseline: the metric of the unchanged model.
        layers: the conv layers; one weight of each is zero at a time.
        positions: the percentiles b, 1 to 100.
        drops: D(b), the baseline minus the metric.
    """

    score: str
    baseline: float
    layers: list[str]
    positions: list[int]
    drops: list[float]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each percentile."""
        for position, drop in zip(self.positions, self.drops, strict=True):
            yield {"percentile": position, "metric": self.baseline - drop, "drop": drop}

    def to_dict(self) -> dict[str, Any]:
        """The curve as JSON types."""
        return {"analysis": "magnitude", **asdict(self)}


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
class LocationMaps:
    """How much is lost without single kernels, layer by layer (Fig. 2).

    Attributes:
        score: what was measured.
        baseline: the metric of the unchanged model.
        maps: one for each layer, in the model's order.
    """

    score: str
    baseline: float
    maps: list[LocationMap]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each kernel."""
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

    def to_dict(self) -> dict[str, Any]:
        """The maps as JSON types."""
        return {"analysis": "location", **asdict(self)}

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
                f"{source} holds no importance maps: {error}",
                "Give the JSON file that `we-surgery analyse location` wrote.",
            ) from error


def magnitude_curve(
    model: nn.Module,
    metric: Metric,
    *,
    positions: Sequence[int] = range(1, 101),
    layers: Sequence[str] = (),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
) -> MagnitudeCurve:
    """Zeroes the weight at each percentile of magnitude, in all conv layers at once.

    WE paper, section 3.1 and Fig. 1a: of n weights sorted by magnitude, percentile b is the one
    at index ``ceil(b * n / 100) - 1``, so that 100 is the largest. Of equal magnitudes the first
    in memory comes first.

    Args:
        model: vanilla, or converted, of which a stripped copy is measured. A vanilla model's
            own weights change meanwhile and come back bit for bit, whatever happens.
        metric: ``metric_fn(model) -> float``, or a loader of ``(inputs, labels)``, which is run
            in eval mode on the model's device.
        positions: the percentiles, each from 1 to 100.
        layers: patterns of the layers to take; by default every conv.
        score: of a loader: ``accuracy``, or ``log_likelihood``, which moves where no prediction
            does.
        progress_file: keeps results while the run lasts, and resumes from it if it is there.
        monitor: such as :func:`we_surgery.analysis.progress_bar` gives.

    Raises:
        InputError: there is no such layer, or the metric cannot be used.
    """
    for position in positions:
        if not 1 <= position <= 100:
            raise InputError(
                f"there is no percentile {position!r}", "Give positions from 1 to 100."
            )
    deployed = as_deployed(model)
    weights = tuple(find_weights(deployed, layers))
    orders: dict[str, Tensor] = {}

    def cells(position: int) -> dict[nn.Parameter, Tensor]:
        found = {}
        for weight in weights:
            if weight.name not in orders:
                magnitudes = weight.parameter.detach().flatten().abs()
                order = magnitudes.argsort(stable=True)
                picked = [math.ceil(b * len(order) / 100) - 1 for b in positions]
                orders[weight.name] = order[picked].cpu()
            found[weight.parameter] = orders[weight.name][[list(positions).index(position)]]
        return found

    changes = [Change(str(b), weights, lambda b=b: cells(b)) for b in positions]  # type: ignore[misc]
    measured = measure(
        deployed,
        changes,
        metric,
        score=score,
        job={"analysis": "magnitude", "layers": [weight.name for weight in weights]},
        progress_file=progress_file,
        monitor=monitor,
    )
    drops = [measured.drop(change.name) for change in changes]
    names = [weight.name for weight in weights]
    return MagnitudeCurve(measured.score, measured.baseline, names, list(positions), drops)


def location_maps(
    model: nn.Module,
    metric: Metric,
    *,
    samples: tuple[int, int] = (5, 5),
    layers: Sequence[str] = (),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
) -> LocationMaps:
    """Zeroes single kernels of each conv with a kernel larger than 1, but for depthwise ones.

    WE paper, section 3.1 and Fig. 2. The sampled filters and input channels are the rounded
    points of an even division that has the first and the last among them; the paper says
    "equidistant".

    Args:
        model: as in :func:`magnitude_curve`.
        metric: as there. With a loader, what lies before a layer is computed once a batch.
        samples: N1 filters, and N2 input channels of each; fewer where there are not as many.
        layers: patterns; by default every conv with more than one kernel position and more than
            one input channel a filter. Layers named here may be any conv.
        score: as in :func:`magnitude_curve`.
        progress_file: as there.
        monitor: as there.

    Raises:
        InputError: there is no such layer, or the metric cannot be used.
    """
    measured, weights = measure_locations(
        model,
        metric,
        samples=samples,
        layers=layers,
        score=score,
        progress_file=progress_file,
        monitor=monitor,
    )
    maps = []
    for weight in weights:
        outputs, channels = _sampled(weight, samples)
        drops = [[measured.drop(_kernel_name(weight, o, i)) for i in channels] for o in outputs]
        maps.append(LocationMap(weight.name, weight.layout.shape, outputs, channels, drops))
    return LocationMaps(measured.score, measured.baseline, maps)


def measure_locations(
    model: nn.Module,
    metric: Metric,
    *,
    samples: tuple[int, int] = (5, 5),
    layers: Sequence[str] = (),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
    share_prefixes: bool = True,
) -> tuple[Measured, list[MeasuredWeight]]:
    """What :func:`location_maps` measures, and of which weights; it takes the same arguments.

    With ``share_prefixes=False`` the whole model is evaluated each time, for comparison.
    """
    if min(samples) < 1:
        raise InputError(f"{samples} kernels cannot be sampled", "Give two positive numbers.")
    deployed = as_deployed(model)
    weights = [
        weight
        for weight in find_weights(deployed, layers)
        if layers or (math.prod(weight.layout.kernel_size) > 1 and weight.layout.channels > 1)
    ]
    if not weights:
        raise InputError(
            "the model has no conv with a kernel larger than 1 and several input channels",
            "Name the layers to map; in Python, `layers=[...]`.",
        )
    changes = [
        Change(_kernel_name(weight, o, i), (weight,), _one_kernel(weight, o, i))
        for weight in weights
        for outputs, channels in [_sampled(weight, samples)]
        for o in outputs
        for i in channels
    ]
    measured = measure(
        deployed,
        changes,
        metric,
        score=score,
        job={"analysis": "location"},
        progress_file=progress_file,
        monitor=monitor,
        share_prefixes=share_prefixes,
    )
    return measured, weights


def _sampled(weight: MeasuredWeight, samples: tuple[int, int]) -> tuple[list[int], list[int]]:
    layout = weight.layout
    return equidistant(layout.out_channels, samples[0]), equidistant(layout.channels, samples[1])


def _kernel_name(weight: MeasuredWeight, output: int, channel: int) -> str:
    return f"{weight.name}[{output},{channel}]"


def _one_kernel(weight: MeasuredWeight, output: int, channel: int) -> Any:
    def cells() -> dict[nn.Parameter, Tensor]:
        chosen = torch.zeros(weight.layout.out_channels, weight.layout.channels, dtype=torch.bool)
        chosen[output, channel] = True
        return {weight.parameter: kernel_cells(weight.layout, chosen)}

    return cells
