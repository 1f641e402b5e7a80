"""The inputs of one weight's closed form, and what its forward pass keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ClosedFormInputs(NamedTuple):
    """The stages of one excitation as tensors and numbers; None where a stage is absent."""

    fc1_weight: Tensor | None = None
    """A, ``[hidden, I]``. The four tensors of LWE come together."""
    fc1_bias: Tensor | None = None
    """a, ``[hidden]``"""
    fc2_weight: Tensor | None = None
    """B, ``[I, hidden]``"""
    fc2_bias: Tensor | None = None
    """b, ``[I]``"""
    gain: Tensor | None = None
    """p, ``[O]``. It comes together with ``shift``, and neither is trained."""
    shift: Tensor | None = None
    """q, ``[O]``"""
    standardize_epsilon: float | None = None
    """Only for filters of at least two weights."""
    mwe_epsilon: float | None = None
    detach_max: bool = True
    transposed_groups: int | None = None


NO_STAGES = ClosedFormInputs()
"""For a weight that is not excited, as in a pause."""


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass; None where a stage is absent."""

    mean: Tensor | None = None
    """``[O, 1, ...]``"""
    norm: Tensor | None = None
    """|c|, ``[O, 1]``"""
    scale: Tensor | None = None
    """r, ``[O, 1]``"""
    hidden: Tensor | None = None
    """h, ``[O, hidden]``"""
    limit: Tensor | None = None
    """M, 0-d"""


class Pullback(NamedTuple):
    """The inputs of one weight's backward pass."""

    gradient: Tensor
    """Of the excited weight; it may be overwritten."""
    weight: Tensor
    """The raw weight, as the layer stores it or as filters ``[O, I, *K]``."""
    inputs: ClosedFormInputs
    kept: Kept
    needed: Sequence[bool]
    """Whether W, A, a, B and b need a gradient."""
    target: Tensor | None = None
    """Memory for the gradient of W, with the strides of ``weight``; None: new memory."""


def changes_nothing(inputs: ClosedFormInputs) -> bool:
    """Whether the excited weight is the raw one."""
    # torch 2.8 cannot compile `inputs is NO_STAGES`.
    return (
        inputs.standardize_epsilon is None
        and inputs.fc1_weight is None
        and inputs.gain is None
        and inputs.mwe_epsilon is None
    )


def fcs_in(inputs: ClosedFormInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, a, B and b in ``dtype``."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
        fc if fc.dtype == dtype else fc.to(dtype)
        for fc in (inputs.fc1_weight, inputs.fc1_bias, inputs.fc2_weight, inputs.fc2_bias)
        if fc is not None
    )
    return fc1_weight, fc1_bias, fc2_weight, fc2_bias


def rescaling(inputs: ClosedFormInputs, filters: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """P and q as ``[O, 1]``."""
    if inputs.gain is None or inputs.shift is None:
        return None, None
    gain, shift = (values.to(filters.dtype).unsqueeze(1) for values in (inputs.gain, inputs.shift))
    return gain, shift
