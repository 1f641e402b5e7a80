"""What LWE learned, and whether its multipliers tell which kernels matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from we_surgery.analysis.changes import Change, Monitor
from we_surgery.analysis.kernels import (
    MeasuredWeight,
    as_deployed,
    find_weights,
    kernel_cells,
    union,
)
from we_surgery.analysis.measuring import measure
from we_surgery.analysis.scores import Metric
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations import Composition
from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.layout import to_filters
from we_surgery.reading import layer_display_name

GRANULARITIES = ("kernel", "channel_per_filter", "channel")
"""What "the channels with the lowest multiplier in each layer" may mean; see
:func:`multiplier_validity`."""


@runtime_checkable
class HasMultiplier(Protocol):
    """A stage of an excitation that multiplies each kernel by a number of its own."""

    def multiplier(self, weight: Tensor) -> Tensor:
        """The numbers for a weight ``[O, I, *K]``, such as ``[O, I]``."""


def multiplier_map(excitation: Composition, raw: Tensor) -> Tensor | None:
    """The multiplier of each kernel, ``[O, I]``, or None where no stage has one.

    Args:
        excitation: what computes the excited weight.
        raw: the raw weight as its layer stores it.

    Several stages with multipliers are multiplied. A multiplier that differs within a kernel
    counts by its mean, one that several kernels share counts for each. Excitation that is paused
    has none.
    """
    if excitation.is_paused or raw.numel() == 0:
        return None
    found: Tensor | None = None
    with torch.no_grad(), autocast_off(raw.device.type):
        filters = in_full_precision(raw.detach())
        if excitation.transposed_groups is not None:
            filters = to_filters(filters, excitation.transposed_groups)
        for stage in excitation.stages:
            if isinstance(stage, HasMultiplier):
                own = stage.multiplier(filters)
                if own.ndim > 2:
                    own = own.mean(tuple(range(2, own.ndim)))
                own = own.expand(filters.shape[:2])
                found = own if found is None else found * own
            filters = stage.excite(filters)
    return found


def multiplier_maps(model: nn.Module) -> dict[str, Tensor]:
    """The map ``[O, I]`` of each excited weight that has multipliers, by layer name.

    Raises:
        InputError: there is none.
    """
    maps = {}
    for weight in excited_weights(model):
        found = multiplier_map(weight.excitation, weight.raw)
        if found is not None:
            maps[layer_display_name(weight.module, weight.parameter)] = found
    if not maps:
        raise InputError(
            "the model has no excited weight with multipliers",
            "Give a model that was converted with LWE and trained, before it is stripped. Of an "
            "attached one give `excitation.converted()`.",
        )
    return maps


@dataclass(frozen=True)
class ValidityRow:
    """One measurement of :func:`multiplier_validity`.

    Attributes:
        granularity: one of :data:`GRANULARITIES`.
        end: ``lowest``, ``highest`` or ``random``.
        draw: which random draw; 0 for the other two.
        metric: the metric without these kernels.
        drop: the baseline minus the metric: D_L, D_H, or that of a random choice.
        sparsity: the share of the measured layers' weights that were zero.
    """

    granularity: str
    end: str
    draw: int
    metric: float
    drop: float
    sparsity: float


@dataclass(frozen=True)
class MultiplierValidity:
    """Whether kernels with a high multiplier matter more (WE paper, end of section 4.2).

    Attributes:
        score: what was measured.
        baseline: the metric of the stripped model.
        layers: the layers with multipliers.
        share: how much was removed of each layer; None for one unit of each.
        measurements: a row for each granularity, end and random draw.
    """

    score: str
    baseline: float
    layers: list[str]
    share: float | None
    measurements: list[ValidityRow]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each measurement."""
        return (asdict(row) for row in self.measurements)

    def drop(self, granularity: str, end: str) -> float:
        """D_L (``lowest``) or D_H (``highest``), or the mean over the random draws."""
        found = [
            row.drop
            for row in self.measurements
            if (row.granularity, row.end) == (granularity, end)
        ]
        return sum(found) / len(found) if found else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON types."""
        return {"analysis": "multipliers", **asdict(self)}


def multiplier_validity(
    model: nn.Module,
    metric: Metric,
    *,
    granularities: Sequence[str] = GRANULARITIES,
    share: float | None = None,
    random_draws: int = 3,
    seed: int = 0,
    layers: Sequence[str] = (),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
) -> MultiplierValidity:
    """Removes what has the lowest multipliers in each layer, then what has the highest.

    The paper writes of "channels with the lowest LWE multiplier in each layer", which its
    supplement calls "h x w filters". Both of its figures and three readings can be had:

    - ``kernel``: one kernel of each layer.
    - ``channel_per_filter``: in each filter, the kernel of one input channel.
    - ``channel``: one input channel of all filters, that of the lowest or highest mean.

    The same number chosen at random is measured beside them: without it, a difference between
    the two ends says nothing about either.

    Args:
        model: a converted model. The kernels are removed from a stripped copy.
        metric: as in :func:`~we_surgery.analysis.magnitude_curve`.
        granularities: which of the three.
        share: removes that share of the units, at least one, instead of one; between 0 and 1.
        random_draws: how many random choices are measured.
        seed: of those.
        layers: patterns; by default all layers that have multipliers.
        score: as in :func:`~we_surgery.analysis.magnitude_curve`.
        progress_file: as there.
        monitor: as there.

    Raises:
        InputError: the model has no multipliers, there is no such granularity or layer, or the
            metric cannot be used.
    """
    for name in granularities:
        if name not in GRANULARITIES:
            raise InputError(
                f"there is no granularity {name!r}{near_matches(name, GRANULARITIES)}",
                f"Use some of: {', '.join(GRANULARITIES)}.",
            )
    deployed, maps = with_multipliers(model, layers)
    check_share(share)
    weights = tuple(maps)
    kinds = [("lowest", 0), ("highest", 0), *(("random", draw) for draw in range(random_draws))]

    def cells(granularity: str, end: str, draw: int) -> dict[nn.Parameter, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + draw)
        return union(
            (w.parameter, kernel_cells(w.layout, _chosen(m, granularity, end, share, generator)))
            for w, m in maps.items()
        )

    keys = [(granularity, *kind) for granularity in granularities for kind in kinds]
    changes = [Change(" ".join(map(str, key)), weights, partial(cells, *key)) for key in keys]
    measured = measure(
        deployed,
        changes,
        metric,
        score=score,
        job={"analysis": "multipliers", "share": share, "seed": seed},
        progress_file=progress_file,
        monitor=monitor,
    )
    total = sum(weight.parameter.numel() for weight in weights)
    rows = [
        ValidityRow(
            *key,
            metric=measured.values[change.name],
            drop=measured.drop(change.name),
            sparsity=sum(part.numel() for part in change.cells().values()) / total,
        )
        for key, change in zip(keys, changes, strict=True)
    ]
    names = [weight.name for weight in weights]
    return MultiplierValidity(measured.score, measured.baseline, names, share, rows)


def with_multipliers(
    model: nn.Module, layers: Sequence[str] = ()
) -> tuple[nn.Module, dict[MeasuredWeight, Tensor]]:
    """The stripped model, and the multiplier maps of its weights.

    Raises:
        InputError: there are none, or a pattern matches no layer.
    """
    maps = multiplier_maps(model)
    deployed = as_deployed(model)
    found = {
        weight: maps[weight.name]
        for weight in find_weights(deployed, layers, kinds="")
        if weight.name in maps
    }
    if not found:
        raise InputError(
            "none of the layers that were named has multipliers",
            f"Name some of: {', '.join(list(maps)[:5])}, ...",
        )
    return deployed, found


def check_share(share: float | None) -> None:
    """Refuses what is no share.

    Raises:
        InputError: it does not lie between 0 and 1.
    """
    if share is not None and not 0 <= share <= 1:
        raise InputError(f"{share!r} is no share", "Give a number from 0 to 1.")


def _chosen(
    multipliers: Tensor,
    granularity: str,
    end: str,
    share: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Which kernels ``[O, I]`` go, bool."""
    if end == "random":
        ranks = torch.rand(multipliers.shape, generator=generator)
    else:
        ranks = multipliers.cpu() if end == "lowest" else -multipliers.cpu()
    if granularity == "kernel":
        chosen = lowest(ranks.flatten(), share).view(ranks.shape)
    elif granularity == "channel":
        # A random channel must be one channel of all filters as well.
        chosen = lowest(ranks.mean(0), share).expand(ranks.shape)
    else:
        chosen = torch.stack([lowest(filter_ranks, share) for filter_ranks in ranks])
    return chosen


def lowest(ranks: Tensor, share: float | None) -> Tensor:
    """A mask of the lowest entries of a vector: that share rounded to a number, or one.

    Equal entries go in their order.
    """
    count = 1 if share is None else round(share * len(ranks))
    mask = torch.zeros(len(ranks), dtype=torch.bool)
    mask[ranks.argsort(stable=True)[:count]] = True
    return mask
