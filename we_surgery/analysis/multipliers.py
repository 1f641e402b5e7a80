"""What LWE learned, and whether its multipliers tell which kernels matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from we_surgery._util.progress import Progress
from we_surgery.analysis.measuring import Cells, Change, measure
from we_surgery.analysis.results import LocationMaps, MultiplierValidity, ValidityRow
from we_surgery.analysis.scores import Metric
from we_surgery.analysis.weights import MeasuredWeight, deployed_copy, find_weights, kernel_mask
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations import Composition, Excitation
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


def stage_inputs(excitation: Composition, raw: Tensor) -> Iterator[tuple[Excitation, Tensor]]:
    """Each stage with the filters ``[O, I, *K]`` that it gets; none where excitation is paused."""
    if excitation.is_paused or raw.numel() == 0:
        return
    filters = in_full_precision(raw.detach())
    if excitation.transposed_groups is not None:
        filters = to_filters(filters, excitation.transposed_groups)
    for stage in excitation.stages:
        yield stage, filters
        with torch.no_grad(), autocast_off(raw.device.type):
            filters = stage.excite(filters)


def multiplier_map(excitation: Composition, raw: Tensor) -> Tensor | None:
    """The multiplier of each kernel, ``[O, I]``, or None where no stage has one.

    Args:
        excitation: what computes the excited weight.
        raw: the raw weight as its layer stores it.

    Several stages with multipliers are multiplied. A multiplier that differs within a kernel
    counts by its mean, one that several kernels share counts for each. Excitation that is paused
    has none.
    """
    found: Tensor | None = None
    for stage, filters in stage_inputs(excitation, raw):
        if isinstance(stage, HasMultiplier):
            with torch.no_grad(), autocast_off(raw.device.type):
                own = stage.multiplier(filters)
            if own.ndim > 2:
                own = own.mean(tuple(range(2, own.ndim)))
            own = own.expand(filters.shape[:2])
            found = own if found is None else found * own
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


def rank_correlations(maps: LocationMaps, multipliers: Mapping[str, Tensor]) -> dict[str, float]:
    """Whether the kernels with the highest multipliers are those that the model needs most.

    Args:
        maps: of :func:`location_maps`.
        multipliers: of :func:`multiplier_maps`, of the same model.

    Returns:
        Spearman's correlation of D with the multiplier over the sampled kernels, for each layer
        with both: 1 where they have the same order, NaN where all of one kind are equal.

    Raises:
        InputError: no layer has both.
    """
    found = {}
    for one in maps.maps:
        if one.layer in multipliers:
            sampled = multipliers[one.layer][one.out_channels][:, one.in_channels]
            pair = torch.stack([_ranks(sampled), _ranks(torch.tensor(one.drops))])
            found[one.layer] = pair.corrcoef()[0, 1].item()
    if not found:
        raise InputError(
            "no layer has both an importance map and multipliers",
            "Give the maps and the multipliers of one model, converted with LWE.",
        )
    return found


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, the mean of their ranks for equal ones."""
    values = values.flatten().cpu()
    below = (values < values[:, None]).sum(1)
    equal = (values == values[:, None]).sum(1)
    return (below + (equal + 1) / 2).double()


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
    progress: Progress | None = None,
) -> MultiplierValidity:
    """Removes the units with the lowest multipliers in each layer, then the highest.

    The paper writes of "channels with the lowest LWE multiplier in each layer", which its
    supplement calls "h x w filters". It has three possible meanings:

    - ``kernel``: one kernel of each layer.
    - ``channel_per_filter``: in each filter, the kernel of one input channel.
    - ``channel``: one input channel of all filters, that of the lowest or highest mean.

    The same number of random units is measured for comparison.

    Args:
        model: a converted model. The kernels are removed from a stripped copy.
        metric: as in :func:`~we_surgery.analysis.magnitude_curve`.
        granularities: which of the three.
        share: the share of the units to remove, from 0 to 1, at least one unit; by default one
            unit.
        random_draws: how many random choices are measured.
        seed: of those.
        layers: patterns; by default all layers that have multipliers.
        score: as in :func:`~we_surgery.analysis.magnitude_curve`.
        progress_file: as there.
        progress: as there.

    Raises:
        InputError: the model has no multipliers, there is no such granularity or layer, or the
            metric cannot be used.
    """
    check_choices("granularity", granularities, GRANULARITIES)
    if share is not None:
        check_share(share)
    copied, maps = with_multipliers(model, layers)
    kinds = [("lowest", 0), ("highest", 0), *(("random", draw) for draw in range(random_draws))]

    def cells(granularity: str, end: str, draw: int) -> Cells:
        generator = torch.Generator().manual_seed(1_000_003 * seed + draw)
        return masked(maps, lambda _, m: _chosen(m, granularity, end, share, generator))

    keys = [(granularity, *kind) for granularity in granularities for kind in kinds]
    changes = [Change(" ".join(map(str, key)), partial(cells, *key)) for key in keys]
    measured = measure(
        copied,
        changes,
        metric,
        score=score,
        job={"analysis": "multipliers", "share": share, "seed": seed},
        progress_file=progress_file,
        progress=progress,
    )
    total = sum(weight.parameter.numel() for weight in maps)
    rows = [
        ValidityRow(
            *key,
            metric=measured.values[change.name],
            drop=measured.drop(change.name),
            sparsity=count(change.cells()) / total,
        )
        for key, change in zip(keys, changes, strict=True)
    ]
    names = [weight.name for weight in maps]
    return MultiplierValidity(measured.score, measured.baseline, names, share, rows)


def _chosen(
    multipliers: Tensor,
    granularity: str,
    end: str,
    share: float | None,
    generator: torch.Generator,
) -> Tensor:
    """A bool mask ``[O, I]`` of the kernels to remove."""
    if end == "random":
        ranks = torch.rand(multipliers.shape, generator=generator)
    else:
        ranks = multipliers if end == "lowest" else -multipliers
    if granularity == "kernel":
        return lowest(ranks, share)
    if granularity == "channel":
        # A random channel must be one channel of all filters as well.
        return lowest(ranks.mean(0), share).expand(ranks.shape)
    return torch.stack([lowest(filter_ranks, share) for filter_ranks in ranks])


def with_multipliers(
    model: nn.Module, layers: Sequence[str] = ()
) -> tuple[nn.Module, dict[MeasuredWeight, Tensor]]:
    """The stripped model, and the multiplier maps of its weights, on the CPU."""
    maps = multiplier_maps(model)
    copied = deployed_copy(model)
    found = {
        weight: maps[weight.name].cpu()
        for weight in find_weights(copied, layers, kinds="")
        if weight.name in maps
    }
    if not found:
        raise InputError(
            "none of the named layers has multipliers",
            f"Name some of: {', '.join(list(maps)[:5])}, ...",
        )
    return copied, found


def masked(
    maps: Mapping[MeasuredWeight, Tensor], chosen: Callable[[MeasuredWeight, Tensor], Tensor]
) -> Cells:
    """The cells of the kernels ``[O, I]`` that are chosen by weight and multipliers."""
    return {w.parameter: kernel_mask(w.layout, chosen(w, m)) for w, m in maps.items()}


def count(cells: Cells) -> int:
    """How many weights the masks cover."""
    return sum(int(mask.sum()) for mask in cells.values())


def lowest(ranks: Tensor, share: float | None) -> Tensor:
    """A mask of the lowest entries: that share rounded to a number, or one.

    Equal entries go in their order.
    """
    number = 1 if share is None else round(share * ranks.numel())
    mask = torch.zeros(ranks.numel(), dtype=torch.bool)
    mask[ranks.flatten().argsort(stable=True)[:number]] = True
    return mask.view(ranks.shape)


def check_share(share: float) -> None:
    """Raises an InputError unless the share is in [0, 1]."""
    if not 0 <= share <= 1:
        raise InputError(f"`share` must be in [0, 1], got {share!r}", "Give a number from 0 to 1.")


def check_choices(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises an InputError for a name that is not known."""
    for name in names:
        if name not in known:
            raise InputError(
                f"there is no {what} {name!r}{near_matches(name, known)}",
                f"Use some of: {', '.join(known)}.",
            )
