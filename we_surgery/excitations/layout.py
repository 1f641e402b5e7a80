"""Reads a weight tensor as filters: ``[out_channels, channels, *kernel]``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightLayout:
    """Shape of one conv or linear weight, and the meaning of its axes.

    Conv and linear weights are stored filter by filter, ``[O, I, *K]`` with
    ``I = in_channels / groups``. Transposed convs store ``[C, O / groups, *K]``; their filters
    must be regrouped before anything can act per filter.

    Attributes:
        shape: of the weight, as the layer stores it.
        groups: of the layer.
        transposed: whether it is a transposed conv.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def in_channels(self) -> int:
        """C, the layer's input channels over all groups."""
        return self.shape[0] if self.transposed else self.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """O, the number of filters."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def channels(self) -> int:
        """I, the input channels that one filter sees."""
        return self.in_channels // self.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The kernel's dimensions; empty for a linear layer."""
        return self.shape[2:]

    @property
    def fan_in(self) -> int:
        """N = I * K, the number of weights in one filter."""
        return self.channels * math.prod(self.kernel_size)


def to_filters(weight: Tensor, groups: int | None) -> Tensor:
    """Regroups a transposed conv's weight ``[C, O/g, *K]`` into ``[O, C/g, *K]``; None: no-op."""
    if groups is None:
        return weight
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def from_filters(filters: Tensor, groups: int | None) -> Tensor:
    """The inverse of :func:`to_filters`."""
    if groups is None:
        return filters
    outputs, inputs, *kernel = filters.shape
    grouped = filters.reshape(groups, outputs // groups, inputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * inputs, outputs // groups, *kernel)
