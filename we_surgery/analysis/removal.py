"""Removing kernels by their multipliers: do these tell what matters, and can one prune by them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import prune

from we_surgery.analysis.measuring import Cells, Change, Measuring, measure
from we_surgery.analysis.multipliers import multiplier_maps
from we_surgery.analysis.results import Ablation, Row
from we_surgery.analysis.scores import Metric
from we_surgery.analysis.weights import MeasuredWeight, deployed_copy, find_weights, kernel_mask
from we_surgery.converted.state import is_converted
from we_surgery.errors import InputError, check_known, near_matches
from we_surgery.excitations.layout import to_filters

GRANULARITIES = ("kernel", "channel_per_filter", "channel")
"""What "the channels with the lowest multiplier in each layer" may mean; see
:func:`multiplier_validity`."""

CRITERIA = ("multiplier", "magnitude", "random")

Maps = Mapping[MeasuredWeight, Tensor]
"""The multipliers of weights, ``[O, I]``."""


def multiplier_validity(
    model: nn.Module,
    metric: Metric,
    *,
    granularities: Sequence[str] = GRANULARITIES,
    share: float | None = None,
    random_draws: int = 3,
    seed: int = 0,
    layers: Sequence[str] = (),
    **measuring: Unpack[Measuring],
) -> Ablation:
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
        share: the share of the units to remove, from 0 to 1, rounded to whole units; by default
            one unit is removed.
        random_draws: how many random choices are measured.
        seed: of those.
        layers: patterns; by default all layers that have multipliers.
        **measuring: as in :func:`~we_surgery.analysis.magnitude_curve`.

    Returns:
        Rows with ``granularity``, ``end`` (``lowest``, ``highest`` or ``random``), ``draw`` (the
        number of the random choice) and ``share``.

    Raises:
        InputError: the model has no multipliers, there is no such granularity or layer, or the
            metric cannot be used.
    """
    for granularity in granularities:
        check_known("granularity", granularity, GRANULARITIES)
    if share is not None:
        _check_share(share)
    copied, maps = _with_multipliers(model, layers)
    ends = [("lowest", 0), ("highest", 0), *(("random", draw) for draw in range(random_draws))]

    def change(granularity: str, end: str, draw: int) -> Change:
        what = {"granularity": granularity, "end": end, "draw": draw, "share": share}
        return _removal(what, copied, maps, end, granularity, share, 1_000_003 * seed + draw)

    changes = [change(granularity, *end) for granularity in granularities for end in ends]
    names = [weight.name for weight in maps]
    return measure("multipliers", copied, changes, metric, layers=names, seed=seed, **measuring)


def pruning_curve(
    model: nn.Module,
    metric: Metric,
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    criteria: Sequence[str] = CRITERIA,
    seed: int = 0,
    layers: Sequence[str] = (),
    **measuring: Unpack[Measuring],
) -> Ablation:
    """Removes a share of the kernels of each layer, by several criteria, with no training after.

    ``multiplier`` removes those with the lowest LWE multiplier (supplement, section 3),
    ``magnitude`` those with the lowest mean absolute weight after strip, ``random`` a random
    choice.

    Args:
        model: a converted model; a stripped copy is pruned.
        metric: as in :func:`~we_surgery.analysis.magnitude_curve`.
        shares: of the kernels of each layer, from 0 to 1.
        criteria: which of the three.
        seed: of the random choice.
        layers: patterns; by default all layers that have multipliers.
        **measuring: as in :func:`~we_surgery.analysis.magnitude_curve`.

    Returns:
        Rows with ``criterion`` and ``share``.

    Raises:
        InputError: the model has no multipliers, or an argument cannot be used.
    """
    for criterion in criteria:
        check_known("criterion", criterion, CRITERIA)
    for share in shares:
        _check_share(share)
    copied, maps = _with_multipliers(model, layers)

    def change(criterion: str, share: float) -> Change:
        what = {"criterion": criterion, "share": share}
        return _removal(what, copied, maps, criterion, "kernel", share, seed)

    changes = [change(criterion, share) for criterion in criteria for share in shares]
    names = [weight.name for weight in maps]
    return measure("prune", copied, changes, metric, layers=names, seed=seed, **measuring)


def multiplier_masks(
    model: nn.Module, share: float, *, layers: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Masks that remove the kernels with the lowest multipliers in each layer.

    Args:
        model: a converted model.
        share: of the kernels of each layer, from 0 to 1.
        layers: patterns; by default all layers that have multipliers.

    Returns:
        By layer name, a float mask of the weight's shape: 0 removes a value and 1 keeps it, as in
        ``torch.nn.utils.prune``.

    Raises:
        InputError: the model has no multipliers, or the share is out of range.
    """
    _check_share(share)
    _, maps = _with_multipliers(model, layers)
    return {
        weight.name: (~kernel_mask(weight.layout, _lowest(multipliers, share))).float()
        for weight, multipliers in maps.items()
    }


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Applies the masks with ``torch.nn.utils.prune``, in place.

    You can train the pruned model further: the masks stay in effect. ``prune.remove(module,
    "weight")`` makes the zeros permanent.

    Args:
        model: the stripped model.
        masks: as :func:`multiplier_masks` gives them.

    Returns:
        ``model``.

    Raises:
        InputError: the model is not stripped, or has no such layer.
    """
    if is_converted(model):
        raise InputError(
            "the model is still converted, and a mask on its raw weights would not make zeros",
            "Strip it first: `apply_masks(ws.strip(model), masks)`.",
        )
    weights = {weight.name: weight for weight in find_weights(model, kinds="")}
    for name, mask in masks.items():
        if name not in weights:
            raise InputError(
                f"the model has no layer {name!r} to prune{near_matches(name, weights)}",
                "Give the stripped model that the masks were made for.",
            )
        weight = weights[name]
        if mask.shape != weight.parameter.shape:
            raise InputError(
                f"the mask of {name!r} is {tuple(mask.shape)} and its weight "
                f"{tuple(weight.parameter.shape)}",
                "Give the stripped model that the masks were made for.",
            )
    for name, mask in masks.items():
        parameter = weights[name].parameter
        for owner in weights[name].owners:
            own = next(key for key, value in owner._parameters.items() if value is parameter)
            prune.custom_from_mask(owner, own, mask.to(parameter))  # type: ignore[no-untyped-call]
    return model


def _with_multipliers(model: nn.Module, layers: Sequence[str]) -> tuple[nn.Module, Maps]:
    """The stripped model, and the multipliers of its weights, on the CPU."""
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


def _removal(
    what: Row,
    model: nn.Module,
    maps: Maps,
    criterion: str,
    granularity: str,
    share: float | None,
    seed: int,
) -> Change:
    """Units of each layer, with the shares of zeros that their removal makes."""

    def cells() -> Cells:
        generator = Generator().manual_seed(seed)
        found = {}
        for weight, multipliers in maps.items():
            ranks = _ranks(criterion, weight, multipliers, generator)
            chosen = _lowest_units(ranks, granularity, share)
            found[weight.parameter] = kernel_mask(weight.layout, chosen)
        return found

    zeros = sum(int(mask.sum()) for mask in cells().values())
    of_layers = sum(weight.parameter.numel() for weight in maps)
    of_model = sum(parameter.numel() for parameter in model.parameters())
    shares = {"sparsity": zeros / of_layers, "model_sparsity": zeros / of_model}
    return Change({**what, **shares}, cells)


def _ranks(
    criterion: str, weight: MeasuredWeight, multipliers: Tensor, generator: Generator
) -> Tensor:
    """A number for each kernel, ``[O, I]``; the lowest are removed."""
    if criterion == "random":
        return torch.rand(multipliers.shape, generator=generator)
    if criterion == "magnitude":
        return _kernel_magnitudes(weight)
    return -multipliers if criterion == "highest" else multipliers


def _lowest_units(ranks: Tensor, granularity: str, share: float | None) -> Tensor:
    """The units with the lowest ranks, as a mask ``[O, I]`` of their kernels."""
    if granularity == "kernel":
        return _lowest(ranks, share)
    if granularity == "channel":
        # A random channel must be one channel of all filters as well.
        return _lowest(ranks.mean(0), share).expand(ranks.shape)
    return torch.stack([_lowest(filter_ranks, share) for filter_ranks in ranks])


def _lowest(ranks: Tensor, share: float | None) -> Tensor:
    """A mask of the lowest entries: that share rounded to a number, or one.

    Equal entries go in their order.
    """
    number = 1 if share is None else round(share * ranks.numel())
    mask = torch.zeros(ranks.numel(), dtype=torch.bool)
    mask[ranks.flatten().argsort(stable=True)[:number]] = True
    return mask.view(ranks.shape)


def _kernel_magnitudes(weight: MeasuredWeight) -> Tensor:
    """``[O, I]``, the mean absolute value of each kernel."""
    values = weight.parameter.detach().abs().cpu()
    if weight.layout.transposed:
        values = to_filters(values, weight.layout.groups)
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"`share` must be in [0, 1], got {share!r}", "Give a number from 0 to 1.")
