"""Location-based weight excitation: a learned multiplier for each (output, input) location."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Excitation
from we_surgery.excitations.layout import WeightLayout


class LWE(Excitation):
    """``W_j * m_j`` with ``m_j = sigmoid(fc2(relu(fc1(mean_K(W_j)))))`` for each filter j.

    WE paper, section 3.2, eq. 1. ``mean_K`` averages each kernel to one value,
    whatever its rank, so ``m_j`` holds one multiplier in (0, 1) for each of the
    I input channels of filter j. All filters of a layer share ``fc1`` and ``fc2``.
    The paper feeds the standardized weight: compose with
    :class:`~we_surgery.excitations.Standardize`.

    Args:
        in_channels: C, the layer's input channels over all groups.
        groups: the layer's groups; one filter sees I = C / groups channels.
        reduction: hidden width is ``max(in_channels // reduction, 1)``, from the
            full ``in_channels`` also for grouped convs (only so does ResNeXt50
            reach the 27.9 M parameters of Table 1).
        device, dtype: those of the layer.

    Parameters are ``fc1`` (I -> hidden) and ``fc2`` (hidden -> I), both with bias,
    in torch's default initialization (supplement, section 1).

    Raises:
        ValueError: a width is not positive, or groups do not divide in_channels.
    """

    name: ClassVar[str] = "lwe"
    order: ClassVar[int] = 10
    summary: ClassVar[str] = "a learned multiplier for each (output, input) location of a kernel"
    source: ClassVar[str] = "WE paper, section 3.2, eq. 1"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.8 -> 77.1 top-1 (WE paper, Table 1)",
        "ImageNet, ResNet18: 70.6 -> 71.0 top-1 (WE paper, Table 1)",
    )
    takes_standardized: ClassVar[bool] = True
    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(
        self,
        in_channels: int,
        groups: int = 1,
        reduction: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("groups", groups),
            ("reduction", reduction),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"lwe: {name} must be a positive integer, not {value!r}")
        if in_channels % groups:
            raise ValueError(f"lwe: {groups} groups do not divide {in_channels} in_channels")
        hidden = max(in_channels // reduction, 1)
        self._add_layers(in_channels // groups, hidden, device, dtype)

    def _add_layers(
        self,
        channels: int,
        hidden: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def excite(self, weight: Tensor) -> Tensor:
        return located(weight, *self.layer_tensors())

    def multiplier(self, weight: Tensor) -> Tensor:
        """The location map m ``[O, I]`` for a weight ``[O, I, *K]`` of at least float32."""
        return location_map(weight, *self.layer_tensors())

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        """Makes the multiplier the same for all kernels, and able to learn; returns it.

        The last layer becomes zero. The first has no gradient until the last has left zero, and
        none for good where a hidden unit is off for every filter: such a unit is mirrored.

        Args:
            weight: what the multiplier is computed from, ``[O, I, *K]``.
        """
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        pooled = weight.mean(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight
        is_off = (_linear(pooled, self.fc1.weight, self.fc1.bias) <= 0).all(0)
        sign = torch.where(is_off, -1.0, 1.0).to(self.fc1.weight.dtype)
        self.fc1.weight.mul_(sign.unsqueeze(1))
        self.fc1.bias.mul_(sign)
        return 0.5  # sigmoid(0)

    def start_affine(self, weight: Tensor) -> Affine:
        return Affine(1 / self.start_constant(weight))

    def layer_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of ``fc1``, then of ``fc2``."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    @classmethod
    def for_layout(
        cls,
        layout: WeightLayout,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
        reduction: int = 16,
    ) -> Self:
        return cls(layout.in_channels, layout.groups, reduction, device=device, dtype=dtype)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        hidden, channels = state["fc1.weight"].shape
        module = cls.__new__(cls)
        Excitation.__init__(module)
        # On meta, so that rebuilding draws no random numbers; the values are assigned after.
        module._add_layers(channels, hidden, torch.device("meta"), state["fc1.weight"].dtype)
        return module


def located(
    weight: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """``W_j * m_j`` for a weight ``[O, I, *K]`` of at least float32; see :class:`LWE`."""
    multiplier = location_map(weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return weight * multiplier.reshape(*multiplier.shape, *[1] * (weight.ndim - 2))


def location_map(
    weight: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """M ``[O, I]``, a multiplier in (0, 1) for each kernel of ``[O, I, *K]``."""
    pooled = weight.mean(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight
    hidden = F.relu(_linear(pooled, fc1_weight, fc1_bias))
    return torch.sigmoid(_linear(hidden, fc2_weight, fc2_bias))


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # The layer's parameters may be half precision; the arithmetic never is.
    return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))
