"""Pruning by what was learned: the kernels with the lowest multipliers go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from we_surgery._util.progress import Progress
from we_surgery.analysis.measuring import Cells, Change, measure
from we_surgery.analysis.multipliers import (
    check_choices,
    check_share,
    count,
    lowest,
    masked,
    with_multipliers,
)
from we_surgery.analysis.results import PruningCurve, PruningRow
from we_surgery.analysis.scores import Metric
from we_surgery.analysis.weights import MeasuredWeight, find_weights, kernel_mask
from we_surgery.converted.state import is_converted
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations.layout import to_filters

CRITERIA = ("multiplier", "magnitude", "random")


def pruning_curve(
    model: nn.Module,
    metric: Metric,
    *,
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    criteria: Sequence[str] = CRITERIA,
    seed: int = 0,
    layers: Sequence[str] = (),
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> PruningCurve:
    """Removes a share of the kernels of each layer, by several criteria.

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
        score: as in :func:`~we_surgery.analysis.magnitude_curve`.
        progress_file: as there.
        progress: as there.

    Raises:
        InputError: the model has no multipliers, or an argument cannot be used.
    """
    check_choices("criterion", criteria, CRITERIA)
    for share in shares:
        check_share(share)
    copied, maps = with_multipliers(model, layers)

    def cells(criterion: str, share: float) -> Cells:
        generator = torch.Generator().manual_seed(seed)

        def removed(weight: MeasuredWeight, multipliers: Tensor) -> Tensor:
            ranks = multipliers
            if criterion == "magnitude":
                ranks = _kernel_magnitudes(weight)
            elif criterion == "random":
                ranks = torch.rand(multipliers.shape, generator=generator)
            return lowest(ranks, share)

        return masked(maps, removed)

    keys = [(criterion, share) for criterion in criteria for share in shares]
    changes = [Change(f"{c} {share:.17g}", partial(cells, c, share)) for c, share in keys]
    measured = measure(
        copied,
        changes,
        metric,
        score=score,
        job={"analysis": "prune", "seed": seed},
        progress_file=progress_file,
        progress=progress,
    )
    pruned = sum(weight.parameter.numel() for weight in maps)
    total = sum(parameter.numel() for parameter in copied.parameters())
    rows = []
    for (criterion, share), change in zip(keys, changes, strict=True):
        zeros = count(change.cells())
        value, drop = measured.values[change.name], measured.drop(change.name)
        rows.append(PruningRow(criterion, share, zeros / pruned, zeros / total, value, drop))
    names = [weight.name for weight in maps]
    return PruningCurve(measured.score, measured.baseline, names, rows)


def _kernel_magnitudes(weight: MeasuredWeight) -> Tensor:
    """``[O, I]``, the mean absolute value of each kernel."""
    values = weight.parameter.detach().abs().cpu()
    if weight.layout.transposed:
        values = to_filters(values, weight.layout.groups)
    return values.flatten(2).mean(2) if values.ndim > 2 else values


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
    check_share(share)
    _, maps = with_multipliers(model, layers)
    return {
        weight.name: (~kernel_mask(weight.layout, lowest(multipliers, share))).float()
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
