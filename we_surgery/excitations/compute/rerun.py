"""Stages of any kind as one autograd function, which runs them again in its backward pass.

Under autograd each stage keeps its intermediates, several times the weight, until its backward
pass. Here the node keeps the raw weight and the excitation's own tensors alone, computes the
stages a second time when the gradient arrives, and frees everything again, one layer after the
other. This costs one more forward pass of the stages. It is used for every excitation that
:mod:`~we_surgery.excitations.compute.closed_form` has no formula for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations.base import Excitation, autocast_off


def excite_and_rerun(excitation: Excitation, weight: Tensor) -> Tensor:
    """:meth:`Excitation.forward`, keeping no intermediate for the backward pass.

    Values and gradients are those of the stages under autograd, to the bit, second derivatives
    included. The stages run as they are under ``torch.compile``, where the compiler decides what is
    kept, and under the transforms of ``torch.func``.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
    ):
        return Excitation.forward(excitation, weight)
    parameters = dict(excitation.named_parameters(remove_duplicate=False)).values()
    excited: Tensor = RerunExcitation.apply(excitation, weight, *parameters)
    return excited


class RerunExcitation(torch.autograd.Function):
    """W' from W and the parameters of an excitation, in the order of their names."""

    @staticmethod
    def forward(ctx: Any, excitation: Excitation, weight: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parameters)
        ctx.excitation = excitation
        ctx.advanced = _advancing_buffers(excitation)
        return Excitation.forward(excitation, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        is_differentiated_again = torch.is_grad_enabled()
        # New tensors, so that no hook on a parameter sees a partial gradient.
        with torch.enable_grad():
            weight, *parameters = (
                tensor.view_as(tensor)
                if is_differentiated_again
                else tensor.detach().requires_grad_(tensor.requires_grad)
                for tensor in ctx.saved_tensors
            )
            names = dict(ctx.excitation.named_parameters(remove_duplicate=False))
            tensors = dict(zip(names, parameters, strict=True)) | ctx.advanced
            excited = _excite_with(ctx.excitation, tensors, weight)
        if not excited.requires_grad:  # a stage that detaches everything
            return (None,) * (1 + len(needed))
        inputs = (weight, *parameters)
        wanted = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed]
        with autocast_off(gradient.device.type):
            gradients = torch.autograd.grad(
                excited, wanted, gradient, create_graph=is_differentiated_again, allow_unused=True
            )
        found = iter(gradients)
        return None, *(next(found) if is_needed else None for is_needed in needed)


def _advancing_buffers(excitation: Excitation) -> dict[str, Tensor]:
    """Copies of the buffers that :meth:`Excitation.advance` moves, by name; mostly none."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.clone()
        for prefix, stage in excitation.named_modules()
        if isinstance(stage, Excitation) and stage.advances
        for name, buffer in stage.named_buffers()
    }


def _excite_with(excitation: Excitation, tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """:meth:`Excitation.forward` with other tensors in the place of parameters and buffers."""
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
        return Excitation.forward(excitation, weight)
    finally:
        for held, last, tensor in places:
            held[last] = tensor
