"""Standardize, LWE, Rescale and MWE at once, with their gradient in closed form.

Run stage by stage, autograd keeps every intermediate of a layer until its backward pass: three
times the weight for standardized LWE, more with MWE. Here the forward pass keeps the weight and a
few numbers per filter; the backward pass computes the rest again and frees it. The formulas are
in :mod:`~we_surgery.excitations.compute.formulas`.

The converted form computes one weight per autograd function (:func:`excite_in_closed_form`). The
attached form computes all weights of a step without autograd (:func:`excite_into`,
:func:`pull_back`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.compute import formulas
from we_surgery.excitations.compute.backends import Backend, kernels, runs_on_kernels
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept, Pullback, fcs_in
from we_surgery.excitations.functions import kernel_mean, linear, spread
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.excitations.mwe import amplified
from we_surgery.excitations.standardize import rescaled, standardized


def excite_in_closed_form(weight: Tensor, inputs: ClosedFormInputs) -> Tensor:
    """The excited weight, in ``weight``'s shape, dtype and memory format.

    It equals the result of the stages one by one, up to rounding. Half precision is computed in
    float32 and rounded once, with autocast off, in both directions. Second derivatives and the
    transforms of ``torch.func`` are taken of :func:`staged`. torch refuses forward-mode derivatives
    outside of these transforms (``torch.autograd.forward_ad``).
    """
    # What torch.autograd.Function itself asks before it refuses.
    if torch._C._are_functorch_transforms_active():
        with autocast_off(weight.device.type):
            return staged(weight, inputs)
    if not torch.is_grad_enabled():
        return _forward(weight, inputs)[0]
    excited: Tensor = ClosedFormExcitation.apply(weight, *inputs)
    return excited


class ClosedFormExcitation(torch.autograd.Function):
    """W' from W and the fields of :class:`ClosedFormInputs`."""

    # No `setup_context`, which torch.func would need: torch then inspects signatures at each call,
    # which takes a fifth of a small layer's time.

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *given: Any) -> Tensor:
        inputs = ClosedFormInputs(*given)
        excited, kept = _forward(weight, inputs)
        # DDP broadcasts buffers before each forward pass, in place.
        gain = None if inputs.gain is None else inputs.gain.clone()
        shift = None if inputs.shift is None else inputs.shift.clone()
        fcs = (inputs.fc1_weight, inputs.fc1_bias, inputs.fc2_weight, inputs.fc2_bias)
        ctx.save_for_backward(weight, *fcs, gain, shift, *kept)
        ctx.options = (
            inputs.standardize_epsilon,
            inputs.mwe_epsilon,
            inputs.detach_max,
            inputs.transposed_groups,
        )
        return excited

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gain, shift, *kept = ctx.saved_tensors
        tensors = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, gain, shift)
        inputs = ClosedFormInputs(*tensors, *ctx.options)
        needed = ctx.needs_input_grad[:5]
        asked = Pullback(gradient, weight, inputs, Kept(*kept), needed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(asked)
        else:
            found = _backward(asked)
        # None for gain, shift, the two epsilons, detach_max and transposed_groups.
        return *found, None, None, None, None, None, None


def staged(weight: Tensor, inputs: ClosedFormInputs) -> Tensor:
    """The same weight by the stages' own formulas, which autograd can differentiate repeatedly."""
    filters = _as_filters(weight, inputs)
    if inputs.standardize_epsilon is not None:
        filters = standardized(filters, inputs.standardize_epsilon)
    if inputs.fc1_weight is not None:
        filters = _located(filters, *fcs_in(inputs, filters.dtype))
    if inputs.gain is not None and inputs.shift is not None:
        filters = rescaled(filters, inputs.gain, inputs.shift)
    if inputs.mwe_epsilon is not None:
        filters = amplified(filters, inputs.mwe_epsilon, inputs.detach_max)
    return from_filters(filters, inputs.transposed_groups).to(weight.dtype)


def _located(
    weight: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """Eq. 1 for a weight ``[O, I, *K]`` of at least float32; WE paper, section 3.2."""
    hidden = F.relu(linear(kernel_mean(weight), fc1_weight, fc1_bias))
    return weight * spread(torch.sigmoid(linear(hidden, fc2_weight, fc2_bias)), weight)


def _forward(weight: Tensor, inputs: ClosedFormInputs) -> tuple[Tensor, Kept]:
    with autocast_off(weight.device.type):
        filters, kept = formulas.excite(_as_filters(weight, inputs), inputs)
    excited = from_filters(filters, inputs.transposed_groups).to(weight.dtype)
    if inputs.transposed_groups is not None:
        # Regrouping loses the memory format, and a conv's result may depend on it.
        excited = torch.empty_like(weight).copy_(excited)
    return excited, kept


def _backward(asked: Pullback) -> tuple[Tensor | None, ...]:
    """The gradients of W, A, a, B and b, where they are needed."""
    gradient, weight, inputs, kept, needed, target = asked
    filters = _as_filters(weight, inputs)
    out = target if filters is weight else None
    # The formulas ask for strides, and a compiler starts over when it is asked. Within the context
    # it would then leave autocast off for the whole model.
    gradient.is_contiguous()
    with autocast_off(weight.device.type):
        by_filters, *by_fcs = formulas.differentiate(
            _as_filters(gradient, inputs), filters, inputs, kept, needed, out
        )
    if by_filters is None:
        return None, *by_fcs
    return from_filters(by_filters, inputs.transposed_groups).to(weight.dtype), *by_fcs


def _differentiable_backward(asked: Pullback) -> tuple[Tensor | None, ...]:
    """:func:`_backward` as a differentiable function, for ``create_graph``."""
    gradient, weight, inputs, _, needed, _ = asked
    fcs = (inputs.fc1_weight, inputs.fc1_bias, inputs.fc2_weight, inputs.fc2_bias)
    sources: list[Any] = [weight, *fcs]
    places = [place for place, is_needed in enumerate(needed) if is_needed]

    def excited(*moving: Tensor) -> Tensor:
        values = sources.copy()
        for place, value in zip(places, moving, strict=True):
            values[place] = value
        raw, fc1_weight, fc1_bias, fc2_weight, fc2_bias = values
        own = inputs._replace(
            fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias
        )
        return staged(raw, own)

    with autocast_off(gradient.device.type):
        pull_back = torch.func.vjp(excited, *(sources[place] for place in places))[1]
        found = dict(zip(places, pull_back(gradient), strict=True))
    return tuple(found.get(place) for place in range(len(sources)))


# All weights of a step, without autograd


@torch.no_grad()
def excite_into(
    weights: Sequence[tuple[Tensor, ClosedFormInputs, Tensor]], backend: Backend
) -> list[Kept]:
    """Writes W' of each weight into a tensor of any float dtype.

    Kernels compute all their weights together. Eager computes one after the other, in the target's
    memory if dtype and strides allow it.

    Args:
        weights: each W, its inputs, and the target.
        backend: as in :func:`we_surgery.attach`.
    """
    kept: dict[int, Kept] = {}
    launched: list[int] = []
    for place, (weight, inputs, target) in enumerate(weights):
        if runs_on_kernels(backend, weight, inputs):
            launched.append(place)
        else:
            kept[place] = _excite_one_into(weight, inputs, target)
    if launched:
        own = [weights[place] for place in launched]
        results = kernels().excite([(_as_filters(w, inputs), inputs) for w, inputs, _ in own])
        for place, (excited, left) in zip(launched, results, strict=True):
            _, inputs, target = weights[place]
            target.copy_(from_filters(excited, inputs.transposed_groups))
            kept[place] = left
    return [kept[place] for place in range(len(weights))]


def _excite_one_into(weight: Tensor, inputs: ClosedFormInputs, target: Tensor) -> Kept:
    is_alike = weight.dtype == target.dtype and weight.stride() == target.stride()
    if inputs.transposed_groups is None and is_alike and in_full_precision(weight) is weight:
        with autocast_off(weight.device.type):
            excited, kept = formulas.excite(weight, inputs, target)
        if excited is not target:
            target.copy_(excited)
        return kept
    excited, kept = _forward(weight, inputs)
    target.copy_(excited)
    return kept


@torch.no_grad()
def pull_back(backend: Backend, asked: Sequence[Pullback]) -> list[tuple[Tensor | None, ...]]:
    """The gradients of W, A, a, B and b of each weight that :func:`excite_into` computed."""
    found: dict[int, tuple[Tensor | None, ...]] = {}
    launched: list[int] = []
    for place, one in enumerate(asked):
        if runs_on_kernels(backend, one.weight, one.inputs):
            launched.append(place)
        else:
            found[place] = _in_target(one, *_backward(one))
    if launched:
        results = kernels().differentiate([_with_filters(asked[place]) for place in launched])
        for place, (by_filters, *by_fcs) in zip(launched, results, strict=True):
            groups = asked[place].inputs.transposed_groups
            by_weight = None if by_filters is None else from_filters(by_filters, groups)
            found[place] = _in_target(asked[place], by_weight, *by_fcs)
    return [found[place] for place in range(len(asked))]


def _in_target(
    asked: Pullback, by_weight: Tensor | None, *by_fcs: Tensor | None
) -> tuple[Tensor | None, ...]:
    if asked.target is not None and by_weight is not None and by_weight is not asked.target:
        by_weight = asked.target.copy_(by_weight)
    return by_weight, *by_fcs


def _with_filters(asked: Pullback) -> Pullback:
    gradient, weight = (_as_filters(t, asked.inputs) for t in (asked.gradient, asked.weight))
    target = asked.target if weight is asked.weight else None
    return asked._replace(gradient=gradient, weight=weight, target=target)


@torch.no_grad()
def excite_in_place(weight: Tensor, inputs: ClosedFormInputs) -> Tensor:
    """:func:`excite_in_closed_form`, bit for bit; a large weight is overwritten with it."""
    if not formulas.is_computed_in_blocks(weight):
        return _forward(weight, inputs)[0]
    filters = to_filters(weight, inputs.transposed_groups)
    with autocast_off(weight.device.type):
        formulas.excite_in_place(filters, inputs)
    if filters is not weight:
        weight.copy_(from_filters(filters, inputs.transposed_groups))
    return weight


def _as_filters(weight: Tensor, inputs: ClosedFormInputs) -> Tensor:
    return to_filters(in_full_precision(weight), inputs.transposed_groups)
