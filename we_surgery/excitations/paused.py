"""An excitation that is not at work yet: the weight itself, and zeros for its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def idle(weight: Tensor, parameters: list[Tensor]) -> Tensor:
    """``weight``, with a graph in which the parameters have a gradient of 0.

    Without one, DDP would wait for them, and an optimizer would meet them later than the rest.
    """
    is_traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if is_traced or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return weight
    excited: Tensor = _Idle.apply(weight, *parameters)
    return excited


class _Idle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros_like(parameter) if needed else None
            for parameter, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        return gradient, *zeros
