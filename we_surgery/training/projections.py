"""Weights projected onto a ball after each step (Barlaud and Guyard, structured projections).

Their abstract names the constraints l1, nuclear norm, l2,1 and a new l1,1. Here are l1, soft
thresholding (Duchi et al., 2008), and l2,1, the same for the lengths of filters; we do not have the
text with the l1,1 algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.errors import InputError
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.training.trained_weights import TrainedWeight, trained_weights

Norm = Literal["l1", "l21"]


@torch.no_grad()
def project(model: nn.Module | AttachedExcitation, norm: Norm, radius: float) -> int:
    """Projects the weight of each trained conv and linear layer onto a ball, in place.

    Call it after each optimizer step. A weight inside the ball does not change. ``l1`` sets single
    weights to zero, ``l21`` whole filters. In excited layers the raw weight is projected; LWE
    without standardization and MWE keep its zeros.

    Args:
        model: a vanilla or converted model, also inside DDP or ``torch.compile``; or an attached
            excitation, whose model's other weights are projected as well.
        norm: ``l1``, the sum of magnitudes, or ``l21``, the sum of the filters' lengths.
        radius: of the ball, the largest norm that a layer's weight may have.

    Returns:
        How many weights were outside.

    Raises:
        InputError: there is no such norm, the radius is not above 0, a weight is sharded, or a
            model with an attached excitation was given instead of the excitation.

    Example:
        >>> optimizer.step()
        >>> ws.project(model, "l21", radius=50.0)
    """
    if norm not in ("l1", "l21") or not radius > 0:
        raise InputError(
            f"a projection on the ball {norm!r} of radius {radius!r} does not exist",
            "Give 'l1' or 'l21', and a radius above 0.",
        )
    weights = list(_weights(model))
    for weight, values in weights:
        if hasattr(values, "full_tensor"):
            raise InputError(
                f"the weight of layer {weight.layer!r} is sharded", "Project before sharding."
            )
    moved = 0
    for weight, values in weights:
        groups = weight.transposed_groups
        filters = to_filters(in_full_precision(values), groups)
        lengths = filters.flatten(1).norm(dim=1) if norm == "l21" else filters.abs()
        if lengths.sum() <= radius:
            continue
        kept = (lengths - _threshold(lengths, radius)).clamp_min(0)
        scale = torch.where(lengths > 0, kept / lengths, 0)
        scale = scale.reshape(scale.shape + (1,) * (filters.ndim - scale.ndim))
        values.copy_(from_filters(filters * scale, groups))
        moved += 1
    if isinstance(model, AttachedExcitation):
        model.restore()  # the model's weights are those of the projected raw ones
    return moved


def _threshold(values: Tensor, radius: float) -> Tensor:
    """What to take off each value of at least 0 so that their positive parts add up to radius."""
    ordered = values.flatten().sort(descending=True).values
    counts = torch.arange(1, len(ordered) + 1, device=values.device)
    thresholds = (ordered.cumsum(0) - radius) / counts
    return thresholds[(ordered > thresholds).sum() - 1]


def _weights(model: nn.Module | AttachedExcitation) -> Iterator[tuple[TrainedWeight, Tensor]]:
    """The trained weights of layers, each with the tensor that training moves."""
    raws: Mapping[int, Tensor] = {}
    if isinstance(model, AttachedExcitation):
        raws = model.raw_weights()
        model = model.model
    for weight in trained_weights(model):
        moved = raws.get(id(weight.parameter), weight.parameter)
        if moved is weight.parameter and weight.is_attached:
            raise InputError(
                f"the weight of layer {weight.layer!r} is excited by an attached excitation",
                "Give the excitation instead of the model.",
            )
        if weight.is_of_layer:
            yield weight, moved
