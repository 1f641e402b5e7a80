"""How a weight tensor is read as filters: ``[out_channels, channels, *kernel]``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightLayout:
    """Shape of one conv or linear weight, and how its axes are to be read.

    Conv and linear weights are stored filter by filter, ``[O, I, *K]`` with
    ``I = in_channels / groups``. Transposed convs store ``[C, O / groups, *K]``,
    so their filters have to be regrouped before anything can act per filter.

    Attributes:
        shape: the weight's shape as the layer stores it.
        groups: the layer's groups.
        transposed: whether the layer is a transposed conv.
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
        """O, the layer's filters."""
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
        """N = I * K, the weights of one filter."""
        return self.channels * math.prod(self.kernel_size)


def to_filters(weight: Tensor, groups: int | None) -> Tensor:
    """Regroups a transposed conv's weight ``[C, O/g, *K]`` into filters ``[O, C/g, *K]``.

    Any other layer's weight, with None for the groups, is made of filters already.
    """
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
