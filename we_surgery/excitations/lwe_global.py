"""LWE with one location net for all layers of a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import (
    ACTIVATIONS,
    check_flag,
    kernel_mean,
    linear,
    make_constant,
)
from we_surgery.excitations.lwe import LWE, Widths
from we_surgery.excitations.lwe_options import Option, one_of

WIDTH = 64
"""The net's input channels, for layers of any width."""

RESIZINGS = ("linear", "area")


class LocationNet(nn.Module):
    """The two layers that all excited layers of a model share."""

    def __init__(self, hidden: int, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, WIDTH, device=device, dtype=dtype)


class GlobalLWE(LWE, attention="global"):
    """``W_j * m_j`` with ``m_j = to_I(sigmoid(fc2(relu(fc1(to_64(mean_K(W_j)))))))``.

    Thesis, section 4.2. All layers of a conversion share ``fc1`` and ``fc2`` (64 -> 64 / reduction
    -> 64), one net per device and dtype; ``to_n`` resizes along the input channels. The options
    are those of :class:`~we_surgery.excitations.LWE` without ``inner``, and

    ``resize``: ``linear`` interpolation as in the thesis' code, which from 256 channels on skips
    some of them, or ``area``, the mean over all.

    ``averaged``: each layer has its own net, and ``ws.average_location_nets`` averages their
    weights, but not their biases, after each optimizer step, as the thesis' code does.
    """

    takes: ClassVar[Mapping[str, Option]] = {
        **{name: option for name, option in LWE.takes.items() if name != "inner"},
        "resize": Option("linear", one_of(RESIZINGS)),
        "averaged": Option(False, check_flag),
    }
    resize: str
    averaged: bool
    net: LocationNet
    is_net_borrowed: bool = False
    """Whether another layer had the net first."""

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        assert self.reduction is not None
        self.net = LocationNet(max(WIDTH // self.reduction, 1), device, dtype)

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        super().share(parts)
        if self.averaged:
            return
        weight = self.net.fc1.weight
        key = (type(self), weight.shape, weight.device, weight.dtype)
        shared = parts.setdefault(key, self.net)
        assert isinstance(shared, LocationNet)
        self.is_net_borrowed = shared is not self.net
        self.net = shared

    def state_dict(
        self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any
    ) -> Any:
        """Copies a shared net: safetensors refuses a tensor twice, and each record is complete."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        if self.is_net_borrowed and not keep_vars:
            for name, _ in self.net.named_parameters():
                key = f"{prefix}net.{name}"
                state[key] = state[key].clone()
        return state

    def _gated(self, weight: Tensor) -> Tensor:
        fc1, fc2 = self.net.fc1, self.net.fc2
        hidden = linear(self._resized(kernel_mean(weight), WIDTH), fc1.weight, fc1.bias)
        located = linear(ACTIVATIONS[self.activation](hidden), fc2.weight, fc2.bias)
        return self._resized(ACTIVATIONS[self.gate](located), weight.shape[1])

    def _resized(self, rows: Tensor, size: int) -> Tensor:
        """``[O, n]`` as ``[O, size]``."""
        if rows.shape[1] == size:
            return rows
        return F.interpolate(rows.unsqueeze(1), size, mode=self.resize).squeeze(1)

    def _start(self, weight: Tensor) -> float:
        """As in LWE, without mirroring units: they may be on in another layer."""
        make_constant(self.net.fc2, self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        weight = state["net.fc1.weight"]
        self.net = LocationNet(weight.shape[0], "meta", weight.dtype)
