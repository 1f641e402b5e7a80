"""What LWE learned: the multiplier of each kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from we_surgery.analysis.results import Ablation
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError
from we_surgery.excitations import Composition, Excitation
from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.layout import to_filters
from we_surgery.reading import layer_display_name


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


def rank_correlations(maps: Ablation, multipliers: Mapping[str, Tensor]) -> dict[str, float]:
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
    for layer, one in maps.kernel_maps().items():
        if layer in multipliers:
            sampled = multipliers[layer][one.out_channels][:, one.in_channels]
            pair = torch.stack([_ranks(sampled), _ranks(torch.tensor(one.drops))])
            found[layer] = pair.corrcoef()[0, 1].item()
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
