"""Pruning by what was learned: the kernels with the lowest multipliers go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from we_surgery.analysis.changes import Change, Monitor
from we_surgery.analysis.kernels import MeasuredWeight, find_weights, kernel_cells, union
from we_surgery.analysis.measuring import measure
from we_surgery.analysis.multipliers import check_share, lowest, with_multipliers
from we_surgery.analysis.scores import Metric
from we_surgery.converted.surgery import is_converted
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations.layout import to_filters

CRITERIA = ("multiplier", "magnitude", "random")


@dataclass(frozen=True)
class PruningRow:
    """One measurement of :func:`pruning_curve`.

    Attributes:
        criterion: one of :data:`CRITERIA`.
        share: of the kernels removed in each layer.
        sparsity: zeros among the pruned layers' weights that pruning made.
        model_sparsity: the same among all parameters of the stripped model.
        metric: without these kernels, with no training after.
        drop: the baseline minus that.
    """

    criterion: str
    share: float
    sparsity: float
    model_sparsity: float
    metric: float
    drop: float


@dataclass(frozen=True)
class PruningCurve:
    """What is left without the kernels that each criterion would remove.

    Attributes:
        score: what was measured.
        baseline: the metric of the stripped model.
        layers: the layers with multipliers, all of which are pruned.
        measurements: a row for each criterion and share.
    """

    score: str
    baseline: float
    layers: list[str]
    measurements: list[PruningRow]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each measurement."""
        return (asdict(row) for row in self.measurements)

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON types."""
        return {"analysis": "prune", **asdict(self)}


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
    monitor: Monitor | None = None,
) -> PruningCurve:
    """Removes a share of the kernels of each layer, by one criterion and another.

    ``multiplier`` removes those with the lowest LWE multiplier (supplement, section 3, which
    removes the very lowest of each layer), ``magnitude`` those of the lowest mean absolute
    weight after strip, ``random`` any.

    Args:
        model: a converted model; a stripped copy is pruned.
        metric: as in :func:`~we_surgery.analysis.magnitude_curve`.
        shares: of the kernels of each layer, from 0 to 1.
        criteria: which of the three.
        seed: of the random choice.
        layers: patterns; by default all layers that have multipliers.
        score: as in :func:`~we_surgery.analysis.magnitude_curve`.
        progress_file: as there.
        monitor: as there.

    Raises:
        InputError: the model has no multipliers, or an argument cannot be used.
    """
    for name in criteria:
        if name not in CRITERIA:
            raise InputError(
                f"there is no criterion {name!r}{near_matches(name, CRITERIA)}",
                f"Use some of: {', '.join(CRITERIA)}.",
            )
    for share in shares:
        check_share(share)
    deployed, maps = with_multipliers(model, layers)
    weights = tuple(maps)

    def cells(criterion: str, share: float) -> dict[nn.Parameter, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return union(
            (w.parameter, kernel_cells(w.layout, _removed(w, m, criterion, share, generator)))
            for w, m in maps.items()
        )

    keys = [(criterion, share) for criterion in criteria for share in shares]
    changes = [Change(f"{c} {share:.17g}", weights, partial(cells, c, share)) for c, share in keys]
    measured = measure(
        deployed,
        changes,
        metric,
        score=score,
        job={"analysis": "prune", "seed": seed},
        progress_file=progress_file,
        monitor=monitor,
    )
    pruned = sum(weight.parameter.numel() for weight in weights)
    total = sum(parameter.numel() for parameter in deployed.parameters())
    rows = []
    for (criterion, share), change in zip(keys, changes, strict=True):
        zeros = sum(part.numel() for part in change.cells().values())
        value = measured.values[change.name]
        drop = measured.baseline - value
        rows.append(PruningRow(criterion, share, zeros / pruned, zeros / total, value, drop))
    names = [weight.name for weight in weights]
    return PruningCurve(measured.score, measured.baseline, names, rows)


def _removed(
    weight: MeasuredWeight,
    multipliers: Tensor,
    criterion: str,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    if criterion == "multiplier":
        ranks = multipliers.cpu()
    elif criterion == "magnitude":
        ranks = kernel_magnitudes(weight).cpu()
    else:
        ranks = torch.rand(multipliers.shape, generator=generator)
    return lowest(ranks.flatten(), share).view(ranks.shape)


def kernel_magnitudes(weight: MeasuredWeight) -> Tensor:
    """``[O, I]``, the mean absolute value of each kernel."""
    values = weight.parameter.detach().abs()
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
        By layer name, a float mask of the weight's shape: 0 goes, 1 stays, as
        ``torch.nn.utils.prune`` has them.

    Raises:
        InputError: the model has no multipliers, or the share is none.
    """
    check_share(share)
    _, maps = with_multipliers(model, layers)
    masks = {}
    for weight, multipliers in maps.items():
        mask = torch.ones(weight.layout.shape)
        chosen = lowest(multipliers.cpu().flatten(), share).view(multipliers.shape)
        mask.view(-1)[kernel_cells(weight.layout, chosen)] = 0
        masks[weight.name] = mask
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Gives the masks to ``torch.nn.utils.prune``, in place.

    The pruned model can be trained on: the masks hold. ``prune.remove(module, "weight")`` makes
    the zeros the weights.

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
