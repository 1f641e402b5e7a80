"""Norm Loss: filters drawn towards unit length (Georgiou et al., arXiv 2103.06583)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.layout import to_filters
from we_surgery.training.trained_weights import trained_weights


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
