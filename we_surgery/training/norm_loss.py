"""Norm Loss: filters drawn towards unit length (Georgiou et al., arXiv 2103.06583)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.attached.registry import excitation_of
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.layer import ExcitedLayer
from we_surgery.errors import InputError
from we_surgery.excitations.layout import to_filters
from we_surgery.reading.kinds import CONV_KINDS
from we_surgery.training.vanilla_view import inside_wrappers

_LAYERS = (*CONV_KINDS, nn.Linear)


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
    model = inside_wrappers(model)
    found: dict[int, Tensor] = {}
    excitations: set[nn.Module] = set()
    for weight in excited_weights(model):
        excitations.update(weight.excitation.modules())
        if weight.raw.requires_grad and id(weight.raw) not in found:
            read = weight.raw if of == "raw" else _excited(weight.owner, weight.parameter)
            if read is None:  # read by a graph
                read = weight.excitation(weight.raw)
            found[id(weight.raw)] = _filters(weight.owner, read)
    for module in model.modules():
        own = module._parameters.get("weight") if isinstance(module, _LAYERS) else None
        if own is not None and own.requires_grad and module not in excitations:
            if of == "raw" and excitation_of(own) is not None:
                raise InputError(
                    "the excitation is attached to the optimizer, so a loss on the model reaches "
                    "the excited weights and not the raw ones",
                    'Pass `of="excited"`, or train the converted form.',
                )
            found.setdefault(id(own), _filters(module, own))
    terms = [(1 - torch.linalg.vector_norm(w, dim=1)).square().sum() for w in found.values()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _excited(owner: nn.Module, parameter: str) -> Tensor | None:
    return getattr(owner, parameter) if isinstance(owner, ExcitedLayer) else None


def _filters(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as ``[filters, weights of one]``, at least in float32."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        weight = to_filters(weight, layer.groups)
    flat = weight.flatten(1)
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
