"""What one composition is made of, as plain tensors, and what its forward pass leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What one composition is made of; None for whatever it does not have.

    Attributes:
        fc1_weight: A, ``[hidden, I]``. The four tensors of LWE come together.
        fc1_bias: a, ``[hidden]``.
        fc2_weight: B, ``[I, hidden]``.
        fc2_bias: b, ``[I]``.
        gain: p, ``[O]``. It comes together with ``shift``, and neither is trained.
        shift: q, ``[O]``.
        standardize_epsilon: only for filters of at least two weights.
        mwe_epsilon: as ``epsilon`` in :class:`~we_surgery.excitations.MWE`.
        detach_max: as in :class:`~we_surgery.excitations.MWE`.
        transposed_groups: as in :class:`~we_surgery.excitations.Composition`.
    """

    fc1_weight: Tensor | None = None
    fc1_bias: Tensor | None = None
    fc2_weight: Tensor | None = None
    fc2_bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    standardize_epsilon: float | None = None
    mwe_epsilon: float | None = None
    detach_max: bool = True
    transposed_groups: int | None = None


TENSOR_TERMS = Terms._fields.index("standardize_epsilon")
"""How many terms are tensors; they come first."""


def tensors_of(terms: Terms) -> tuple[Tensor | None, ...]:
    """The terms that are tensors."""
    # torch 2.8 compiles no slice of a named tuple.
    tensors: tuple[Any, ...] = tuple(terms)[:TENSOR_TERMS]
    return tensors


def changes_nothing(terms: Terms) -> bool:
    """Whether the excited weight is the raw one."""
    numbers = (terms.standardize_epsilon, terms.mwe_epsilon)
    return all(term is None for term in (*tensors_of(terms), *numbers))


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass; None where a stage is absent."""

    mean: Tensor | None
    """``[O, 1, ...]``"""
    norm: Tensor | None
    """|c|, ``[O, 1]``"""
    scale: Tensor | None
    """r, ``[O, 1]``"""
    hidden: Tensor | None
    """h, ``[O, hidden]``"""
    limit: Tensor | None
    """M, 0-d"""


class Pullback(NamedTuple):
    """What the backward pass of one weight is given."""

    gradient: Tensor
    """Of the excited weight, ``[O, I, *K]``; it may be used up."""
    filters: Tensor
    """The raw weight, ``[O, I, *K]``."""
    terms: Terms
    kept: Kept
    needed: Sequence[bool]
    """Whether W, A, a, B and b need a gradient."""


def fcs_in(terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, a, B and b in ``dtype``."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
        term if term.dtype == dtype else term.to(dtype)
        for term in (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
        if isinstance(term, Tensor)
    )
    return fc1_weight, fc1_bias, fc2_weight, fc2_bias


def rescaling(terms: Terms, filters: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """P and q as ``[O, 1]``."""
    if terms.gain is None or terms.shift is None:
        return None, None
    gain, shift = (values.to(filters.dtype).unsqueeze(1) for values in (terms.gain, terms.shift))
    return gain, shift
