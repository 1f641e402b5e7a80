"""Excitation of the gradient alone: the layer computes with W, and W moves as if excited.

The papers explain their gains by amplified gradients. These stages separate that effect from the
changed weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import check_mapping, spread
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.lwe import LWE
from we_surgery.excitations.mwe import MWE, curve_limit


class MWEGradient(Excitation):
    """``W``, whose gradient is multiplied by ``M_A^2 / (M_A^2 - w^2)``, the slope of MWE's curve.

    WE paper, eq. 3 without eq. 2; ``M_A = (1 + epsilon) * max|W|`` with the epsilon of
    :class:`~we_surgery.excitations.MWE`.
    """

    name: ClassVar[str] = "mwe_gradient"
    order: ClassVar[int] = MWE.order
    summary: ClassVar[str] = "MWE's gain on the gradient; the weight stays as it is"
    source: ClassVar[str] = "WE paper, eq. 3 without eq. 2: not in the papers"
    takes_standardized: ClassVar[bool] = True
    adjustable: ClassVar[tuple[str, ...]] = ("epsilon",)

    def __init__(self, epsilon: float = 0.1, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__()
        self.check_options({"epsilon": epsilon})
        self.epsilon = float(epsilon)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        MWE.check_options(options)

    def excite(self, weight: Tensor) -> Tensor:
        held = weight.detach()
        pole = curve_limit(held, self.epsilon).square()
        return held + pole / (pole - held.square()) * (weight - held)

    def invert(self, excited: Tensor) -> Tensor:
        return excited


class LWEGradient(Excitation):
    """``W``, whose gradient is multiplied by LWE's m.

    WE paper, eq. 1, on the gradient alone. The layers that compute m get the gradient that they
    would get if W m were the weight; W gets no gradient through them. The option ``lwe`` holds the
    options of :class:`~we_surgery.excitations.LWE`, such as ``{"attention": "cbam"}``.
    """

    name: ClassVar[str] = "lwe_gradient"
    order: ClassVar[int] = LWE.order
    summary: ClassVar[str] = "LWE's multiplier on the gradient; the weight stays as it is"
    source: ClassVar[str] = "WE paper, eq. 1 on gradients: not in the papers"
    takes_standardized: ClassVar[bool] = True

    def __init__(self, lwe: LWE) -> None:
        super().__init__()
        lwe.is_part = True
        self.lwe = lwe

    def excite(self, weight: Tensor) -> Tensor:
        held = weight.detach()
        product = weight * spread(self.lwe.multiplier(held), weight)
        return held + (product - product.detach())

    def start_affine(self, weight: Tensor) -> Affine:
        self.lwe.start_constant(weight)
        return Affine()

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        self.lwe.share(parts)

    def chosen_options(self) -> dict[str, Any]:
        return {"lwe": self.lwe.chosen_options()}

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {"lwe": None}

    @classmethod
    def for_layout(
        cls, layout: WeightLayout, *, device: Device, dtype: DType, **options: Any
    ) -> Self:
        given = options.get("lwe")
        own = check_mapping("lwe_gradient: lwe", {} if given is None else given)
        return cls(LWE.for_layout(layout, device=device, dtype=dtype, **own))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        own = {key.removeprefix("lwe."): value for key, value in state.items()}
        return cls(LWE.from_state(own, options["lwe"]))
