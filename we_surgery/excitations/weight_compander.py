"""Weight compander: a curve that bounds large weights and drives small ones away from zero."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations.base import Device, DType, Excitation
from we_surgery.excitations.functions import check_flag, check_positive


class WeightCompander(Excitation):
    """``a * arctan(w / b)`` with a and b per layer, trained or fixed.

    Cakaj, Mehnert and Yang (arXiv 2306.16993). No excited weight exceeds ``a pi / 2``, and the
    slope at 0 is a / b. **Not verified**: we had only the paper's abstract (a nonlinear function of
    each weight that restricts its magnitude and forces it away from zero, with learned
    hyper-parameters); the arctan and the defaults are reconstructed.

    Args:
        a: the scale of the excited weight; by default the largest magnitude of the layer's weight
            at conversion.
        b: the scale of the raw weight; by default half of that, for a slope of 2 at 0.
        learn: trains a and b, as logarithms, ``log_a`` and ``log_b``, so that they stay positive.
    """

    name: ClassVar[str] = "weight_compander"
    order: ClassVar[int] = 20
    summary: ClassVar[str] = "a curve that bounds large weights and widens small ones"
    source: ClassVar[str] = "Cakaj et al., Weight Compander (formula could not be verified)"
    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        a: float | None = None,
        b: float | None = None,
        learn: bool = True,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.a = None if a is None else check_positive("weight_compander: a", a)
        self.b = None if b is None else check_positive("weight_compander: b", b)
        self.learn = check_flag("weight_compander: learn", learn)
        for name, value in (("log_a", self.a or 1.0), ("log_b", self.b or 0.5)):
            start = torch.full((1,), math.log(value), device=device, dtype=dtype)
            if learn:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def excite(self, weight: Tensor) -> Tensor:
        a, b = self._scales(weight.dtype)
        return a * torch.atan(weight / b)

    def _scales(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.log_a.to(dtype).exp(), self.log_b.to(dtype).exp()

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        if self.a is None:
            self.log_a.copy_(largest.log())
        if self.b is None:
            self.log_b.copy_((largest / 2).log())

    def invert(self, excited: Tensor) -> Tensor:
        a, b = self._scales(excited.dtype)
        reach = (a * math.pi / 2).item()
        largest = excited.abs().amax().item()
        if largest >= reach:
            raise InputError(
                f"weight_compander cannot yield the assigned weight: its largest value is "
                f"{largest:.4g}, and the limit is {reach:.4g}",
                "Convert the model again from that weight, or give a larger `a`.",
            )
        return b * torch.tan(excited / a)

    @torch.no_grad()
    def start_inverse(self, weight: Tensor) -> Tensor:
        self.log_a.copy_(torch.maximum(self.log_a, weight.abs().amax().log()))
        return self.invert(weight)
