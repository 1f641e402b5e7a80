"""A gain per filter: channel attention whose input is constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import check_choice, linear, make_constant, spread, wake_units
from we_surgery.excitations.layout import WeightLayout

ATTENTIONS = ("none", "se")
_REDUCTION = 16
_START = 0.1
"""The learned input's, in the authors' code."""


class Gain(Excitation):
    """``g_j W_j`` for each filter j, with a trained g.

    With ``attention="none"`` the parameter is g itself, ``gain``, ``[O]``, from 1.

    With ``attention="se"`` it is ASR (Huang et al., ECCV 2024, arXiv 2304.06345), "attention-alike
    structural re-parameterization": channel attention on a learned vector instead of the means of
    activations, ``g = sigmoid(fc2(relu(fc1(input))))`` with O / 16 hidden units, which is a
    constant after training. The authors put it after the norm and fold it into the norm. Here it
    is folded into the weight: biases are not multiplied, and a norm after the layer undoes its
    value, but not its effect on the gradients.
    """

    name: ClassVar[str] = "gain"
    order: ClassVar[int] = 12
    summary: ClassVar[str] = "a trained gain per filter, plain or of attention to a learned vector"
    source: ClassVar[str] = "Huang et al., ASR (arXiv 2304.06345)"
    published: ClassVar[tuple[str, ...]] = (
        "CIFAR-100, ResNet164, behind the norm: 74.10 -> 75.21, SE 75.03, both 76.23 (README of "
        "zhongshsh/ASR)",
    )

    def __init__(
        self,
        out_channels: int,
        attention: str = "none",
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.attention = check_choice("gain: attention", attention, ATTENTIONS)
        if attention == "none":
            self.gain = nn.Parameter(torch.ones(out_channels, device=device, dtype=dtype))
            return
        hidden = max(round(out_channels / _REDUCTION), 1)
        start = torch.full((out_channels,), _START, device=device, dtype=dtype)
        self.input = nn.Parameter(start)
        self.fc1 = nn.Linear(out_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out_channels, device=device, dtype=dtype)

    def excite(self, weight: Tensor) -> Tensor:
        return weight * spread(self._gains(weight.dtype), weight)

    def _gains(self, dtype: torch.dtype) -> Tensor:
        if self.attention == "none":
            return self.gain.to(dtype)
        hidden = F.relu(linear(self.input.to(dtype), self.fc1.weight, self.fc1.bias))
        return torch.sigmoid(linear(hidden, self.fc2.weight, self.fc2.bias))

    @torch.no_grad()
    def start_affine(self, weight: Tensor) -> Affine:
        if self.attention == "none":
            self.gain.fill_(1)
            return Affine()
        wake_units(self.fc1, self.input.to(weight.dtype).unsqueeze(0))
        make_constant(self.fc2, 0.0)
        return Affine(2.0)

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return (layout.out_channels,)

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return (len(state["gain" if "gain" in state else "input"]),)
