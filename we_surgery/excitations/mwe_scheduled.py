"""MWE whose epsilon follows a schedule over the steps of training."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from we_surgery.excitations.base import Device, DType
from we_surgery.excitations.functions import check_choice, check_count
from we_surgery.excitations.mwe import MWE

SHAPES = ("cosine", "linear")
_MOST_STEPS = 2**24 - 1
"""Float32 counts no further."""


class MWEScheduled(MWE):
    """MWE with ``epsilon_t = final + (epsilon - final) f(min(t / steps, 1))``, t from 0.

    ``f(p)`` is ``(1 + cos(pi p)) / 2`` or, with ``shape="linear"``, ``1 - p``. From step ``steps``
    on epsilon stays at ``final``. Not in the papers, whose epsilon is constant. By default the
    curve sets in slowly.

    A step is one of the optimizer where the excitation is attached, and one forward pass in
    training where the model is converted. The buffer ``step`` counts them, so a checkpoint resumes
    to the bit.

    Args:
        epsilon, final: epsilon at the first step, and at the end; from 1e-6 to 1.
        steps: how many steps epsilon moves.
        shape: ``cosine`` or ``linear``.
        device, dtype: of the weight.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "mwe_scheduled"
    summary: ClassVar[str] = "MWE whose epsilon moves during training"
    source: ClassVar[str] = "WE paper, section 3.3, with a constant epsilon: not in the papers"
    published: ClassVar[tuple[str, ...]] = ()
    adjustable: ClassVar[tuple[str, ...]] = ()
    step: Tensor
    """How many steps have begun."""

    def __init__(
        self,
        epsilon: float = 1.0,
        final: float = 0.1,
        steps: int = 1000,
        shape: str = "cosine",
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(epsilon)
        self.check_options({"epsilon": final})
        self.final = float(final)
        self.steps = check_count("mwe_scheduled: steps", steps)
        if steps > _MOST_STEPS:
            raise ValueError(f"mwe_scheduled: steps must be at most {_MOST_STEPS}, not {steps}")
        self.shape = check_choice("mwe_scheduled: shape", shape, SHAPES)
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("step", torch.zeros((), dtype=precision, device=device))

    def _epsilon(self) -> Tensor:
        passed = ((self.step - 1) / self.steps).clamp_min(0)
        left = 1 - passed if self.shape == "linear" else (1 + torch.cos(math.pi * passed)) / 2
        return self.final + (self.epsilon - self.final) * left

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        self.step.add_(1).clamp_(max=self.steps + 1)
