"""LWE whose locations are the positions of a kernel, for depthwise convs above all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import check_count
from we_surgery.excitations.lwe import LWE, Widths
from we_surgery.excitations.lwe_options import Option, optional


class PositionLWE(LWE, attention="position"):
    """``W_j * s_j`` with ``s_j = gate(fc2(activation(fc1(mean_I(W_j)))))``, ``[*K]``.

    LWE turned around: it averages over the I input channels and has one multiplier for each of the
    K positions of the kernel. It thus has something to learn where I is 1, as in depthwise convs.
    Not in the papers. All filters share ``fc1`` (K -> hidden) and ``fc2`` (hidden -> K); hidden
    is the option ``hidden``, by default ``K // 2``. The further options are those of
    :class:`~we_surgery.excitations.LWE`, without ``reduction``.
    """

    takes: ClassVar[Mapping[str, Option]] = {
        **{name: option for name, option in LWE.takes.items() if name != "reduction"},
        "hidden": Option(None, optional(check_count)),
    }
    hidden: int | None

    @classmethod
    def _unfit_kernel(cls, kernel: tuple[int, ...]) -> str | None:
        return "has kernels of one position" if math.prod(kernel) < 2 else None

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        positions = math.prod(widths.kernel)
        hidden = self.hidden or positions // 2
        super()._add_layers(widths._replace(channels=positions, hidden=hidden), device, dtype)

    def _gated(self, weight: Tensor) -> Tensor:
        by_position = super()._gated(weight)
        return by_position.view(weight.shape[0], 1, *weight.shape[2:]).expand_as(weight)

    def _pooled(self, weight: Tensor) -> Tensor:
        """``[O, K]``."""
        return weight.mean(1).flatten(1)

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (state["fc1.weight"].shape[1],)
