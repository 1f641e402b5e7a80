"""Shift Attention Layers: attention that narrows until each kernel has one position left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType, Excitation
from we_surgery.excitations.functions import check_choice, check_flag, check_positive
from we_surgery.excitations.layout import WeightLayout

HARDENINGS = ("soft", "argmax", "round")


class ShiftAttention(Excitation):
    """``W * softmax(T * A / std(A))`` over the positions of each kernel, A being trained.

    Hacene et al. (ICPR 2020), as in their code. T is an inverse temperature that grows during
    training (:class:`~we_surgery.training.ShiftAttentionSchedule`) until all but one position of a
    kernel are near zero; :func:`we_surgery.harden` then sets them to zero, and the layer is a shift
    and a 1x1 conv. A is the parameter ``attention``, ``[O, I, *K]``, and starts uniform in (0, 1).
    The deviation is each kernel's, unbiased; scale and mean of A have no effect.

    Args:
        shared: all filters choose the same positions; A is ``[1, I, *K]``.
        inverse_temperature: the first T; the authors' code has 20 for CIFAR and 0.15 for ImageNet.
    """

    name: ClassVar[str] = "shift_attention"
    forms: ClassVar[str] = "both; `ws.harden` with the converted one"
    order: ClassVar[int] = 40
    summary: ClassVar[str] = "attention within kernels that narrows to one position each"
    source: ClassVar[str] = "Hacene et al., Attention Based Pruning for Shift Networks"
    deploys_to: ClassVar[str] = (
        "once hardened, the vanilla layer with one weight per kernel, bit-equal"
    )
    adjustable: ClassVar[tuple[str, ...]] = ("hardening",)
    attention: nn.Parameter
    inverse_temperature: Tensor
    """A buffer, because it grows during training."""
    hardening: str
    """``soft``, ``argmax`` or ``round``."""

    def __init__(
        self,
        out_channels: int,
        channels: int,
        kernel_size: tuple[int, ...],
        shared: bool = False,
        inverse_temperature: float = 20.0,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        if math.prod(kernel_size) < 2:
            raise ValueError("shift_attention: a kernel of one position has nothing to choose from")
        check_positive("shift_attention: inverse_temperature", inverse_temperature)
        self.shared = check_flag("shift_attention: shared", shared)
        self.hardening = "soft"
        filters = 1 if shared else out_channels
        start = torch.rand(filters, channels, *kernel_size, device=device, dtype=dtype)
        self.attention = nn.Parameter(start)
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        temperature = torch.tensor(inverse_temperature, dtype=precision, device="cpu")
        self.register_buffer("inverse_temperature", temperature)

    def chosen_options(self) -> dict[str, Any]:
        return {"shared": self.shared, "hardening": self.hardening}

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"shared": False, "hardening": "soft", **options}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        check_choice("shift_attention: hardening", options["hardening"], HARDENINGS)

    def excite(self, weight: Tensor) -> Tensor:
        return weight * self.positions(weight.dtype)

    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factors of the weight, ``[O or 1, I, *K]``; once hardened, one-hot in each kernel."""
        scores = self.attention.to(dtype).flatten(2)
        if self.hardening == "argmax":
            largest = scores.argmax(2, keepdim=True)
            flat = torch.zeros_like(scores).scatter(2, largest, 1.0)
        else:
            flat = self._softmax(scores)
            if self.hardening == "round":
                flat = torch.round(flat)
        return flat.reshape(self.attention.shape)

    def _softmax(self, scores: Tensor) -> Tensor:
        deviation = scores.std(2, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        temperature = self.inverse_temperature.to(scores.dtype)
        return torch.softmax(temperature * scores / deviation, 2)

    @torch.no_grad()
    def undecided(self) -> int:
        """The number of kernels without a position over one half, which ``round`` sets to zero."""
        largest = self._softmax(self.attention.float().flatten(2)).amax(2)
        return int((largest <= 0.5).sum())

    def stored_words(self, weight: Tensor) -> float:
        """The 32-bit words of the hardened layer: one weight and one position per kernel.

        A position takes 4 bits in a 3x3 kernel; shared ones are stored once per input channel.
        """
        filters, channels, *kernel_size = self.attention.shape
        positions = math.prod(kernel_size)
        kernels = weight.numel() // positions
        places = kernels if filters > 1 else channels
        return kernels + places * math.ceil(math.log2(positions)) / 32

    @classmethod
    def unsupported_reason(cls, layout: WeightLayout, options: Mapping[str, Any]) -> str | None:
        is_single = math.prod(layout.kernel_size) < 2
        return "has kernels of one position, with nothing to choose from" if is_single else None

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        return layout.out_channels, layout.channels, layout.kernel_size

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        attention = state["attention"]
        filters, channels, *kernel = attention.shape
        shared, dtype = options["shared"], attention.dtype
        module = cls(filters, channels, tuple(kernel), shared, device="meta", dtype=dtype)
        cls.check_options(options)
        module.hardening = options["hardening"]
        return module

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.attention.shape))
        return f"{shape}, {self.hardening}"
