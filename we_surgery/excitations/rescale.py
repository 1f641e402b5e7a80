"""Each filter times a fixed gain plus a fixed shift: what standardization took, given back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from we_surgery.excitations.base import Excitation
from we_surgery.excitations.layout import WeightLayout


class Rescale(Excitation):
    """``gain_j * W_j + shift_j`` for each filter j.

    A pretrained weight that is to be excited with standardization loses its filters' scale and
    mean. :meth:`Composition.preserve <we_surgery.excitations.Composition.preserve>` puts them
    here, so that the converted model computes what the pretrained one did. They are buffers:
    part of the state dict, and not trained.

    Args:
        gain: ``[O]``.
        shift: ``[O]``.
    """

    name: ClassVar[str] = "rescale"
    order: ClassVar[int] = 15
    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def excite(self, weight: Tensor) -> Tensor:
        return rescaled(weight, self.gain, self.shift)

    def invert(self, excited: Tensor) -> Tensor:
        gain, shift = (_per_filter(v, excited) for v in (self.gain, self.shift))
        return (excited - shift) / gain

    @classmethod
    def for_layout(
        cls, layout: WeightLayout, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> Self:
        raise TypeError("a rescaling is made from a pretrained weight; see `Composition.preserve`")

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        return cls(state["gain"], state["shift"])


def rescaled(weight: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """See :class:`Rescale`; for a weight ``[O, I, *K]`` of at least float32."""
    return torch.addcmul(_per_filter(shift, weight), weight, _per_filter(gain, weight))


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    return values.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
