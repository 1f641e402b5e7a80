"""Weight standardization, and the rescaling that restores a filter's mean and scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import is_number


class Standardize(Excitation):
    """``(W_j - mean_j) / (std_j + epsilon)`` for each filter j, std unbiased.

    Weight standardization (Qiao et al.), the input of LWE and MWE in the WE paper (end of section
    3.3 and section 4.1).

    A filter of a single weight (fan-in 1) has no standard deviation and stays unchanged; a
    constant filter becomes 0 with a finite gradient. The variance is computed from the centred
    weight: the one-pass formula is 7 % off at a mean of 1000 standard deviations. The weight is
    centred twice: the rounding of a mean of 0.3 turns a constant filter into 3e-3.

    Args:
        epsilon: added to each standard deviation; at least 0 and finite.
        device, dtype: of the layer; it has no tensors.

    Raises:
        ValueError: epsilon is negative or not finite.
    """

    name: ClassVar[str] = "standardize"
    order: ClassVar[int] = 0
    summary: ClassVar[str] = "each filter with mean 0 and standard deviation 1"
    source: ClassVar[str] = "Qiao et al., Weight Standardization; WE paper, section 3.3, Table 2"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.8 -> 76.1 top-1 (WE paper, Table 2)",
        "ImageNet, ResNet50 with GN: 75.5 -> 76.0 (WE paper, Table 4)",
    )
    adjustable: ClassVar[tuple[str, ...]] = ("epsilon",)

    def __init__(
        self, epsilon: float = 1e-5, *, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        self.check_options({"epsilon": epsilon})
        self.epsilon = float(epsilon)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        epsilon = options["epsilon"]
        if not (is_number(epsilon) and math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"standardize: epsilon must be finite and at least 0, not {epsilon!r}")

    def closed_form_fields(self) -> dict[str, Any] | None:
        return {"standardize_epsilon": self.epsilon} if type(self) is Standardize else None

    def excite(self, weight: Tensor) -> Tensor:
        return standardized(weight, self.epsilon)

    def start_affine(self, weight: Tensor) -> Affine:
        if weight[0].numel() < 2:
            return Affine()
        deviation, mean = deviation_and_mean(weight)
        return Affine(deviation + self.epsilon, mean)


class Rescale(Excitation):
    """``gain_j * W_j + shift_j`` for each filter j.

    Standardization removes scale and mean from the filters of a pretrained weight.
    :meth:`Composition.preserve <we_surgery.excitations.Composition.preserve>` stores them here, so
    that the converted model starts with the pretrained outputs. They are buffers, ``[O]`` each,
    and not trained.
    """

    name: ClassVar[str] = "rescale"
    order: ClassVar[int] = 15
    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def closed_form_fields(self) -> dict[str, Any] | None:
        if type(self) is not Rescale or self.gain.requires_grad:
            return None
        return {"gain": self.gain, "shift": self.shift}

    def excite(self, weight: Tensor) -> Tensor:
        return rescaled(weight, self.gain, self.shift)

    def invert(self, excited: Tensor) -> Tensor:
        gain, shift = (_per_filter(v, excited) for v in (self.gain, self.shift))
        return (excited - shift) / gain

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        return cls(state["gain"], state["shift"])


def rescaled(weight: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """:class:`Rescale`, for a weight ``[O, I, *K]`` of at least float32."""
    return torch.addcmul(_per_filter(shift, weight), weight, _per_filter(gain, weight))


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))


def standardized(weight: Tensor, epsilon: float) -> Tensor:
    """``(W_j - mean_j) / (std_j + epsilon)`` for a weight ``[O, I, *K]`` of at least float32."""
    if weight[0].numel() < 2:
        return weight
    centred = _centred(weight)
    return centred / (_deviation(centred) + epsilon)


def deviation_and_mean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[O]`` each, of the filters of ``[O, I, *K]``."""
    centred = _centred(weight)
    return _deviation(centred).flatten(), (weight - centred).flatten(1).mean(1)


def _centred(weight: Tensor) -> Tensor:
    dims = tuple(range(1, weight.ndim))
    nearly_centred = weight - weight.detach().mean(dims, keepdim=True)
    return nearly_centred - nearly_centred.mean(dims, keepdim=True)


def _deviation(centred: Tensor) -> Tensor:
    # std(W_j) = |W_j - mean_j| / sqrt(N - 1). The norm's gradient at 0 is 0, which suits constant
    # filters.
    dims = tuple(range(1, centred.ndim))
    norm: Tensor = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)
    return norm / math.sqrt(centred[0].numel() - 1)
