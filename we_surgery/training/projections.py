"""Weights projected on a ball after each step (Barlaud and Guyard, structured projections).

Their abstract names a gradient step and then a projection on a convex set, with the constraints l1,
nuclear norm, l2,1 and a new l1,1. The formulas here are the known ones: l1 is soft thresholding
(Duchi et al., 2008), l2,1 the same of the filters' lengths. The l1,1 algorithm is not in the texts
at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.attached.registry import excitation_of
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.reading.kinds import CONV_KINDS
from we_surgery.training.vanilla_view import inside_wrappers

_LAYERS = (*CONV_KINDS, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


Norm = Literal["l1", "l21"]


@torch.no_grad()
def project(model: nn.Module | AttachedExcitation, norm: Norm, radius: float) -> int:
    """Projects each conv and linear weight that is trained on a ball, in place.

    Call it after each optimizer step. What lies within the ball stays. ``l1`` makes single weights
    zero, ``l21`` whole filters. Of excited layers it is the raw weight that is projected: LWE
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
    for name, _, weight in weights:
        if hasattr(weight, "full_tensor"):
            raise InputError(f"the weight of layer {name!r} is sharded", "Project before sharding.")
    moved = 0
    for _, groups, weight in weights:
        filters = to_filters(in_full_precision(weight), groups)
        lengths = filters.flatten(1).norm(dim=1) if norm == "l21" else filters.abs()
        if lengths.sum() <= radius:
            continue
        kept = (lengths - _threshold(lengths, radius)).clamp_min(0)
        scale = torch.where(lengths > 0, kept / lengths, 0)
        scale = scale.reshape(scale.shape + (1,) * (filters.ndim - scale.ndim))
        weight.copy_(from_filters(filters * scale, groups))
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


def _weights(model: nn.Module | AttachedExcitation) -> Iterator[tuple[str, int | None, Tensor]]:
    """Each trained weight once: its name, the groups of a transposed conv, and what is trained."""
    raws: Mapping[int, Tensor] = {}
    excitations: set[nn.Module] = set()
    if isinstance(model, AttachedExcitation):
        raws = model.raw_weights()
        model = model.model
    model = inside_wrappers(model)
    owned: dict[int, nn.Parameter] = {}
    for weight in excited_weights(model):
        excitations.update(weight.excitation.modules())
        owned[id(weight.owner)] = weight.raw
    seen: set[int] = set()
    for name, module in model.named_modules():
        is_layer = isinstance(module, _LAYERS) and module not in excitations
        own = owned.get(id(module), module._parameters.get("weight")) if is_layer else None
        if own is None or id(own) in seen or not own.requires_grad:
            continue
        seen.add(id(own))
        if excitation_of(own) is not None and id(own) not in raws:
            raise InputError(
                f"the weight of layer {name!r} is excited by an attached excitation",
                "Give the excitation instead of the model.",
            )
        groups = module.groups if isinstance(module, _TRANSPOSED) else None
        yield name, groups, raws.get(id(own), own)
