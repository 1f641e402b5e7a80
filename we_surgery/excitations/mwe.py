"""Magnitude-based weight excitation: a curve that amplifies a layer's large weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from we_surgery.excitations.base import Excitation
from we_surgery.excitations.layout import WeightLayout

_SMALLEST_EPSILON = 1e-6
_LARGEST_EPSILON = 1.0


class MWE(Excitation):
    """``M_A * atanh(w / M_A)`` with ``M_A = (1 + epsilon) * max|W|`` over the whole layer.

    WE paper, section 3.3, eq. 2 (``M_A * 0.5 * ln((1 + w/M_A) / (1 - w/M_A))`` is the
    same curve; that form loses weights below 1e-6 in float32). It has no parameters
    and works on any shape.

    Args:
        epsilon: distance of the curve's pole from the largest weight; the paper uses
            0.1 and names 0 < epsilon < 0.2. Values from 1e-6 (below it float32 cannot
            tell M_A from the largest weight) to 1 (nearly the identity) are accepted.
        detach_max: M_A is a constant in the backward pass, which gives eq. 3,
            ``dL/dw = M_A^2 / (M_A^2 - w^2) * dL/dw'``. The public code lets the gradient
            flow through the maximum, which turns the largest weight's own factor of 5.76
            into 1.67 at epsilon 0.1; ``detach_max=False`` reproduces that.
        dtype: dtype of the layer; float64 keeps epsilon in float64.

    A weight of zeros is returned as it is, and so is one of subnormal numbers.

    Raises:
        ValueError: epsilon is out of range.
    """

    name: ClassVar[str] = "mwe"
    order: ClassVar[int] = 20
    summary: ClassVar[str] = "a curve that amplifies a layer's large weights"
    source: ClassVar[str] = "WE paper, section 3.3, eqs. 2 and 3"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.83 -> 76.52 top-1 at epsilon 0.1, 76.38 at 0.001, 76.43 at 0.2 "
        "(WE paper, Tables 3 and 5)",
        "Jester, TSM-ResNet50: 96.3 -> 96.6 top-1 (WE paper, Table 6)",
    )
    takes_standardized: ClassVar[bool] = True
    epsilon: Tensor

    def __init__(
        self, epsilon: float = 0.1, detach_max: bool = True, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        # Written so that NaN is refused as well. The tolerance admits a bound that was
        # stored in float32.
        lowest = _SMALLEST_EPSILON * (1 - 1e-6)
        if not (isinstance(epsilon, int | float) and lowest <= epsilon <= _LARGEST_EPSILON):
            raise ValueError(
                f"mwe: epsilon must lie between {_SMALLEST_EPSILON:g} and {_LARGEST_EPSILON:g}, "
                f"not {epsilon!r}"
            )
        if not isinstance(detach_max, bool):
            raise ValueError(f"mwe: detach_max must be true or false, not {detach_max!r}")
        self.register_hyperparameter("epsilon", epsilon, dtype)
        self.detach_max = detach_max
        if not detach_max:
            # The presence of this key is what tells a state dict's reader.
            self.register_buffer("undetached_max", torch.tensor(True, device="cpu"))

    def excite(self, weight: Tensor) -> Tensor:
        return amplified(weight, self.epsilon, self.detach_max)

    def invert(self, excited: Tensor) -> Tensor:
        # The largest weight is mapped to (1 + e) * atanh(1 / (1 + e)) times itself.
        largest_gain = (1 + self.epsilon) * torch.atanh(1 / (1 + self.epsilon))
        limit = curve_limit(excited / largest_gain, self.epsilon)
        return limit * torch.tanh(excited / limit)

    @classmethod
    def for_layout(
        cls,
        layout: WeightLayout,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
        epsilon: float = 0.1,
        detach_max: bool = True,
    ) -> Self:
        module = cls(epsilon, detach_max, dtype=dtype)
        return module if device is None else module.to(device)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        options: dict[str, Any] = {"detach_max": "undetached_max" not in state}
        return cls(state["epsilon"].item(), dtype=state["epsilon"].dtype, **options)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon.item():g}, detach_max={self.detach_max}"


def amplified(weight: Tensor, epsilon: Tensor, detach_max: bool) -> Tensor:
    """``M_A * atanh(w / M_A)`` for a weight of at least float32; see :class:`MWE`."""
    limit = curve_limit(weight.detach() if detach_max else weight, epsilon)
    return limit * torch.atanh(weight / limit)


def curve_limit(weight: Tensor, epsilon: Tensor) -> Tensor:
    """M_A, a 0-d tensor; 1 for a weight of zeros, so that nothing is divided by 0."""
    smallest, largest = torch.aminmax(weight)
    limit = (1 + epsilon) * torch.maximum(-smallest, largest)
    # Subnormal weights count as zeros: their M_A may round to the largest weight itself.
    vanishes = limit < torch.finfo(limit.dtype).tiny
    return torch.where(vanishes, torch.ones_like(limit), limit)
