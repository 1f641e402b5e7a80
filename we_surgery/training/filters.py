"""Training on the filters of layers, in either form: a norm loss, and projections after each step.

Norm Loss draws filters towards unit length (Georgiou et al., arXiv 2103.06583). Projections keep
weights in a ball (Barlaud and Guyard, structured projections). Their abstract names the constraints
l1, nuclear norm, l2,1 and a new l1,1. Here are l1, soft thresholding (Duchi et al., 2008), and
l2,1, the same for the lengths of filters; we do not have the text with the l1,1 algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.attached.registry import excitation_of
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.errors import InputError
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.reading.kinds import CONV_KINDS
from we_surgery.training.vanilla_view import inside_wrappers


def norm_loss(model: nn.Module, of: Literal["raw", "excited"] = "raw") -> Tensor:
    """How far the filters of a model are from unit length: ``sum_j (1 - |W_j|)^2``.

    The sum goes over all filters (one per output channel) of all trained conv and linear layers and
    of the excited weights of other modules. It changes no layer, so there is nothing to strip. Add
    it to the loss with a factor of your choice: the abstract says that each weight vector is pushed
    "to have a norm close to one"; we could not verify the authors' factor and choice of layers.

    Args:
        model: a converted or vanilla model; also inside DDP or ``torch.compile``. A model with an
            attached excitation needs ``of="excited"``.
        of: ``raw`` or ``excited``, the weight to take for excited layers. A standardized filter of
            N weights always has the length ``sqrt(N - 1)``, so with standardization, as in the mode
            ``lwe``, ``excited`` gives a large loss without effect.

    Returns:
        A scalar; zero for a model without such layers.

    Raises:
        InputError: ``of`` is neither, or is ``raw`` for a model with an attached excitation.

    Example:
        >>> loss = criterion(model(x), y) + 1e-3 * ws.norm_loss(model)
    """
    if of not in ("excited", "raw"):
        raise InputError(f"`of` must be 'raw' or 'excited', got {of!r}", "Give one of the two.")
    lengths = []
    for weight in trained_weights(model):
        if of == "raw" and weight.is_attached:
            raise InputError(
                "the excitation is attached to the optimizer, so a loss on the model reaches the "
                "excited weights and not the raw ones",
                'Pass `of="excited"`, or train the converted form.',
            )
        read = weight.parameter if of == "raw" else weight.computed()
        filters = to_filters(in_full_precision(read), weight.transposed_groups).flatten(1)
        lengths.append(torch.linalg.vector_norm(filters, dim=1))
    terms = [(1 - length).square().sum() for length in lengths]
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def project(
    model: nn.Module | AttachedExcitation, norm: Literal["l1", "l21"], radius: float
) -> int:
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


_LAYERS: tuple[type[nn.Module], ...] = (*CONV_KINDS, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class TrainedWeight:
    """One weight: the Parameter of a layer, or the raw weight of an excited one."""

    layer: str
    owner: nn.Module
    parameter: nn.Parameter
    excited: ExcitedWeight | None = None

    @property
    def is_of_layer(self) -> bool:
        """Whether a conv or linear layer has it; attentions and graphs have others."""
        return isinstance(self.owner, _LAYERS)

    @property
    def is_attached(self) -> bool:
        """Whether an optimizer's step excites it, and it holds the excited values."""
        return excitation_of(self.parameter) is not None

    @property
    def transposed_groups(self) -> int | None:
        """As :func:`~we_surgery.excitations.layout.to_filters` takes them."""
        return self.owner.groups if isinstance(self.owner, _TRANSPOSED) else None

    def computed(self) -> Tensor:
        """What the layer computes with."""
        if self.excited is None:
            return self.parameter
        return self.excited.excitation(self.parameter)  # type: ignore[no-any-return]


def trained_weights(model: nn.Module) -> Iterator[TrainedWeight]:
    """Each trained weight once, those of converted layers first; none of an excitation's own."""
    model = inside_wrappers(model)
    seen: set[int] = set()
    excitations: set[nn.Module] = set()
    found = []
    for weight in excited_weights(model):
        excitations.update(weight.excitation.modules())
        found.append(TrainedWeight(weight.name, weight.owner, weight.raw, weight))
    for name, module in model.named_modules():
        own = module._parameters.get("weight") if isinstance(module, _LAYERS) else None
        if own is not None and module not in excitations:
            found.append(TrainedWeight(name, module, own))
    for one in found:
        if one.parameter.requires_grad and id(one.parameter) not in seen:
            seen.add(id(one.parameter))
            yield one
