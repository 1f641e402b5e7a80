"""Stages of any kind as one autograd function, which runs them again in its backward pass.

Under autograd each stage keeps its intermediates, several times the weight, until its backward
pass. Here the node keeps the raw weight and the excitation's own tensors alone, computes the
stages a second time when the gradient arrives, and frees everything again, one layer after the
other. It costs one more forward pass of the stages and no formula: what
:mod:`~we_surgery.excitations.compute.closed_form` does not know is excited so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations.base import Excitation, autocast_off
from we_surgery.excitations.repeatable import Remembered


def excite_and_rerun(excitation: Excitation, weight: Tensor) -> Tensor:
    """:meth:`Excitation.forward`, keeping no intermediate for the backward pass.

    Values and gradients are those of the stages under autograd, to the bit, second derivatives
    included. Under ``torch.compile``, where the compiler decides what is kept, and under the
    transforms of ``torch.func`` the stages run as they are.

    Args:
        excitation: its ``excite`` is a function of the weight, its parameters and its buffers.
        weight: as the layer stores it.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
    ):
        return Excitation.forward(excitation, weight)
    excited: Tensor = RerunExcitation.apply(excitation, weight, *_parameters(excitation).values())
    return excited


class RerunExcitation(torch.autograd.Function):
    """W' from W and the parameters of an excitation; *repeatable* as the closed form's node is."""

    @staticmethod
    def forward(ctx: Any, excitation: Excitation, weight: Tensor, *parameters: Tensor) -> Tensor:
        ctx.is_repeatable = True
        ctx.inputs = Remembered(weight, parameters)
        ctx.excitation = excitation
        ctx.advanced = advanced_buffers(excitation)
        return Excitation.forward(excitation, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.inputs.tensors()
        is_differentiated_again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Stand-ins, so that no hook on a parameter sees a gradient that is not yet its own.
            own: list[Any] = [_stand_in(value, is_differentiated_again) for value in inputs]
            stand_ins = dict(zip(_parameters(ctx.excitation), own[1:], strict=True))
            with holding(ctx.excitation, stand_ins | ctx.advanced):
                excited = Excitation.forward(ctx.excitation, own[0])
        needed = ctx.needs_input_grad[1:]
        if not excited.requires_grad:  # a stage that detaches everything
            return (None,) * (1 + len(needed))
        wanted = [value for value, is_needed in zip(own, needed, strict=True) if is_needed]
        with autocast_off(gradient.device.type):
            found = iter(
                torch.autograd.grad(
                    excited,
                    wanted,
                    gradient,
                    create_graph=is_differentiated_again,
                    allow_unused=True,
                )
            )
        return None, *(next(found) if is_needed else None for is_needed in needed)


def _parameters(excitation: Excitation) -> dict[str, Tensor]:
    """All by all their names: stages may share one."""
    return dict(excitation.named_parameters(remove_duplicate=False))


def _stand_in(value: Any, is_differentiated_again: bool) -> Tensor:
    tensor: Tensor = value
    if is_differentiated_again:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(tensor.requires_grad)


def advanced_buffers(excitation: Excitation) -> dict[str, Tensor]:
    """Copies of the buffers that :meth:`Excitation.advance` moves, by name; mostly none."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.clone()
        for prefix, stage in excitation.named_modules()
        if isinstance(stage, Excitation) and stage.advances
        for name, buffer in stage.named_buffers()
    }


@contextlib.contextmanager
def holding(excitation: Excitation, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts other tensors, by name, in the place of parameters and buffers for the time being."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, value in tensors.items():
            module, _, last = name.rpartition(".")
            owner = excitation.get_submodule(module)
            held: dict[str, Any] = (
                owner._parameters if last in owner._parameters else owner._buffers
            )
            places.append((held, last, held[last]))
            held[last] = value
        yield
    finally:
        for held, last, tensor in places:
            held[last] = tensor
