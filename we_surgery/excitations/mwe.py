"""Magnitude-based weight excitation: a curve that amplifies a layer's large weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Device, DType, Excitation
from we_surgery.excitations.functions import check_choice, check_flag, is_number

_SMALLEST_EPSILON = 1e-6
_LARGEST_EPSILON = 1.0
_LEARNABLE = ("none", "epsilon", "mix")


def novel(x: Tensor) -> Tensor:
    """``0.5 x / ln(1 + exp(-0.3 x))`` (thesis, eq. 3.7): slope 0.72 at 0, 0.90 at 1; not odd."""
    return 0.5 * x / F.softplus(-0.3 * x)


def novel_log10(x: Tensor) -> Tensor:
    """The same with the logarithm to base 10, as in the thesis' code: slope 1.66 at 0."""
    return novel(x) * math.log(10)


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "atanh": torch.atanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "shifted_softplus": lambda x: F.softplus(x) - math.log(2),
    "lecun_tanh": lambda x: 1.7159 * torch.tanh(2 / 3 * x),
    "star_relu": lambda x: 0.8944 * F.relu(x) ** 2 - 0.4472,
    "novel": novel,
    "novel_log10": novel_log10,
}
"""The values of the option ``curve``. All but the first are from the thesis, section 3.3.1, which
finds none of them satisfactory, and its eq. 3.7."""


class MWE(Excitation):
    """``M_A * atanh(w / M_A)`` with ``M_A = (1 + epsilon) * max|W|`` over the whole layer.

    WE paper, section 3.3, eq. 2. (Its form ``M_A * 0.5 * ln((1 + w/M_A) / (1 - w/M_A))`` is the
    same curve, but loses weights below 1e-6 in float32.) It has no parameters and accepts any
    shape.

    Args:
        epsilon: distance of the curve's pole from the largest weight, from 1e-6 (below, float32
            does not distinguish M_A from the largest weight) to 1 (nearly the identity). The
            paper uses 0.1 and names 0 < epsilon < 0.2.
        detach_max: M_A is a constant in the backward pass, which gives eq. 3,
            ``dL/dw = M_A^2 / (M_A^2 - w^2) * dL/dw'``. ``False`` lets the gradient flow through
            the maximum, as the public code does: the largest weight's factor is then 1.67 instead
            of 5.76 at epsilon 0.1.
        curve: one of :data:`~we_surgery.excitations.mwe.CURVES`.
        rescale: multiplies the curve of w / M_A by M_A. ``False`` with ``curve="novel_log10"`` is
            the thesis' code; the excited weight then has a scale of about 1 and needs a norm after
            it.
        relative: ``False`` gives ``curve(w)`` without M_A, so ``epsilon``, ``detach_max`` and
            ``rescale`` have no effect. With ``curve="novel"`` it is the thesis' eq. 3.7 as printed.
            Not for atanh, which is not defined for all weights.
        maximum: M is the largest weight of the ``tensor`` (the paper) or of each ``filter``, or a
            quantile of the magnitudes such as 0.99, over which weights get the gain of the one at
            it. The latter two are not in the papers.
        learn: ``epsilon`` trains epsilon, as ``softplus(rho)`` over 1e-6; ``mix`` trains a, from
            1, in ``a W' + (1 - a) W`` (thesis, chapter 8, which names the idea without a form).
        device, dtype: of the learned parameter.

    atanh leaves weights of zeros or subnormal numbers unchanged. Only atanh has an inverse here
    and can start as an identity.

    Raises:
        ValueError: epsilon is out of range, or the curve does not exist.
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
    adjustable: ClassVar[tuple[str, ...]] = ("epsilon",)
    epsilon: float
    """The start, if it is learned."""

    def __init__(
        self,
        epsilon: float = 0.1,
        detach_max: bool = True,
        curve: str = "atanh",
        rescale: bool = True,
        learn: str = "none",
        relative: bool = True,
        maximum: str | float = "tensor",
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.check_options({"epsilon": epsilon})
        self.epsilon = float(epsilon)
        self.detach_max = check_flag("mwe: detach_max", detach_max)
        self.curve = check_choice("mwe: curve", curve, CURVES)
        self.rescale = check_flag("mwe: rescale", rescale)
        self.learn = check_choice("mwe: learn", learn, _LEARNABLE)
        self.relative = check_flag("mwe: relative", relative)
        self.maximum = _check_maximum(maximum)
        if not relative and (curve == "atanh" or learn == "epsilon"):
            raise ValueError(
                "mwe: relative=False needs another curve than atanh, and has no epsilon to learn"
            )
        if learn == "epsilon":
            rho = math.log(math.expm1(max(epsilon - _SMALLEST_EPSILON, _SMALLEST_EPSILON)))
            self.rho = nn.Parameter(torch.full((1,), rho, device=device, dtype=dtype))
        if learn == "mix":
            self.mix = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        epsilon = options["epsilon"]
        # This form refuses NaN too. The tolerance admits a bound stored in float32.
        lowest = _SMALLEST_EPSILON * (1 - 1e-6)
        if not (is_number(epsilon) and lowest <= epsilon <= _LARGEST_EPSILON):
            raise ValueError(
                f"mwe: epsilon must lie between {_SMALLEST_EPSILON:g} and {_LARGEST_EPSILON:g}, "
                f"not {epsilon!r}"
            )

    def closed_form_fields(self) -> dict[str, Any] | None:
        # Only eq. 2; subclasses compute something else.
        plain = self._is_paper_curve and self.learn == "none" and self.maximum == "tensor"
        if type(self) is not MWE or not plain:
            return None
        return {"mwe_epsilon": self.epsilon, "detach_max": self.detach_max}

    @property
    def _is_paper_curve(self) -> bool:
        return self.curve == "atanh" and self.rescale and self.relative

    def excite(self, weight: Tensor) -> Tensor:
        if self.relative:
            held = weight.detach() if self.detach_max else weight
            limit = curve_limit(held, self._epsilon(), self.maximum)
            excited = self._bent(weight / limit)
            excited = limit * excited if self.rescale else excited
        else:
            excited = CURVES[self.curve](weight)
        if self.learn != "mix":
            return excited
        mix = self.mix.to(weight.dtype)
        return mix * excited + (1 - mix) * weight

    def _bent(self, ratio: Tensor) -> Tensor:
        if self.curve != "atanh" or isinstance(self.maximum, str):
            return CURVES[self.curve](ratio)
        # Straight on from M, where the curve would come to its pole.
        largest, gain = self._at_maximum(ratio)
        within = ratio.abs() <= largest
        return torch.where(within, torch.atanh(ratio.where(within, 0)), gain * ratio)

    def _at_maximum(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """M / M_A, and the gain of a weight of that size."""
        pole = torch.as_tensor(1 + self._epsilon(), dtype=like.dtype, device=like.device)
        return 1 / pole, pole * torch.atanh(1 / pole)

    def _epsilon(self) -> Tensor | float:
        if self.learn != "epsilon":
            return self.epsilon
        # In full precision: in half precision 1 + epsilon may round to 1.
        rho = self.rho if self.rho.dtype == torch.float64 else self.rho.float()
        return F.softplus(rho).squeeze(0) + _SMALLEST_EPSILON

    def invert(self, excited: Tensor) -> Tensor:
        if not self._is_paper_curve or self.learn == "mix":
            return super().invert(excited)
        return self._inverted(excited)

    @torch.no_grad()
    def start_inverse(self, weight: Tensor) -> Tensor:
        if self.learn != "mix" or not self._is_paper_curve:
            return super().start_inverse(weight)
        self.mix.fill_(1)
        return self._inverted(weight)

    def _inverted(self, excited: Tensor) -> Tensor:
        # Rounded as in `curve_limit`, also if the model has become float64 since.
        largest, gain = self._at_maximum(excited)
        limit = curve_limit(excited / gain, self._epsilon(), self.maximum)
        ratio = excited / limit
        if isinstance(self.maximum, str):
            return limit * torch.tanh(ratio)
        return torch.where(ratio.abs() <= largest * gain, limit * torch.tanh(ratio), excited / gain)

    def extra_repr(self) -> str:
        epsilon = self._epsilon()
        if isinstance(epsilon, Tensor):
            epsilon = math.nan if epsilon.is_meta else epsilon.item()
        shown = f"epsilon={epsilon:g}, detach_max={self.detach_max}"
        if self.closed_form_fields() is not None:
            return shown
        chosen = f"curve={self.curve}, rescale={self.rescale}, relative={self.relative}"
        return f"{shown}, {chosen}, learn={self.learn}, maximum={self.maximum}"


def _check_maximum(value: object) -> str | float:
    if is_number(value) and 0 < value < 1:
        return float(value)
    if value in ("tensor", "filter"):
        return str(value)
    raise ValueError(
        f"mwe: maximum must be tensor, filter or a quantile between 0 and 1, not {value!r}"
    )


def amplified(weight: Tensor, epsilon: Tensor | float, detach_max: bool) -> Tensor:
    """``M_A * atanh(w / M_A)`` for a weight of at least float32; see :class:`MWE`."""
    limit = curve_limit(weight.detach() if detach_max else weight, epsilon)
    return limit * torch.atanh(weight / limit)


def curve_limit(weight: Tensor, epsilon: Tensor | float, maximum: str | float = "tensor") -> Tensor:
    """M_A, which broadcasts over the weight; 1 where M is 0, so that nothing is divided by 0."""
    # Not aminmax: torch 2.8 cannot differentiate it, and it copies channels_last weights. The ONNX
    # exporter needs the dimensions of amin.
    dims = tuple(range(maximum == "filter", weight.ndim))
    if isinstance(maximum, str):
        kept = maximum == "filter"
        largest = torch.maximum(-weight.amin(dims, kept), weight.amax(dims, kept))
    else:
        rank = max(math.ceil(maximum * weight.numel()), 1)
        largest = weight.abs().flatten().kthvalue(rank).values
    limit = (1 + epsilon) * largest
    # Subnormal weights count as zeros: M_A may round to the largest one.
    vanishes = limit < torch.finfo(limit.dtype).tiny
    return torch.where(vanishes, torch.ones_like(limit), limit)
