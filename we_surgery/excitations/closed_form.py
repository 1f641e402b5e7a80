"""Standardize, LWE, Rescale and MWE as one autograd function, with their gradient in closed form.

Run stage by stage, autograd keeps every intermediate of a layer until its backward pass: three
times the weight for standardized LWE, more with MWE. Here the backward pass starts from the
weight itself and a few numbers a filter, rebuilds the rest and frees it again. The formulas are in
:mod:`~we_surgery.excitations.formulas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations import formulas, repeatable
from we_surgery.excitations.backends import Backend, arithmetic
from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.excitations.lwe import located
from we_surgery.excitations.mwe import amplified
from we_surgery.excitations.rescale import rescaled
from we_surgery.excitations.standardize import standardized
from we_surgery.excitations.terms import Kept, Terms, fcs_in

_TENSOR_TERMS = Terms._fields.index("detach_max")


def excite_in_closed_form(weight: Tensor, terms: Terms, backend: Backend = "eager") -> Tensor:
    """The excited weight, in ``weight``'s shape, dtype and memory format.

    What the stages give one by one, up to rounding. Half precision is computed in float32 and
    rounded once, with autocast off, in both directions. Second derivatives and the transforms
    of ``torch.func`` are taken of :func:`staged`; forward-mode derivatives outside of them
    (``torch.autograd.forward_ad``) are refused by torch.

    Args:
        weight: as the layer stores it, with at least one element.
        terms: the layer's composition.
        backend: who computes it; under ``torch.compile`` it is always the compiler.
    """
    # What torch.autograd.Function itself asks before it refuses.
    if torch._C._are_functorch_transforms_active():
        return staged(weight, *terms)
    if not torch.is_grad_enabled():
        return _forward(weight, terms, backend)[0]
    excited: Tensor = ClosedFormExcitation.apply(weight, *terms, backend)
    return excited


@torch.no_grad()
def excite_in_place(weight: Tensor, terms: Terms) -> Tensor:
    """:func:`excite_in_closed_form` in eager, bit for bit, in a large weight's own memory.

    Args:
        weight: as there.
        terms: as there.

    Returns:
        ``weight``, overwritten; or for a small one memory of its own.
    """
    if not formulas.is_computed_in_blocks(weight):
        return _forward(weight, terms, "eager")[0]
    filters = weight
    with autocast_off(weight.device.type):
        if terms.transposed_groups is not None:
            filters = to_filters(weight, terms.transposed_groups)
        formulas.excite_in_place(filters, terms)
    if terms.transposed_groups is not None:
        weight.copy_(from_filters(filters, terms.transposed_groups))
    return weight


def staged(weight: Tensor, *terms: Any) -> Tensor:
    """The same weight by the stages' own formulas, which autograd differentiates at will."""
    given = Terms(*terms)
    filters = _as_filters(weight, given)
    if given.standardize_epsilon is not None:
        filters = standardized(filters, given.standardize_epsilon)
    if given.fc1_weight is not None:
        filters = located(filters, *fcs_in(given, filters.dtype))
    if given.gain is not None and given.shift is not None:
        filters = rescaled(filters, given.gain, given.shift)
    if given.mwe_epsilon is not None:
        filters = amplified(filters, given.mwe_epsilon, given.detach_max)
    return _as_stored(filters, given).to(weight.dtype)


def _forward(weight: Tensor, terms: Terms, backend: Backend) -> tuple[Tensor, Kept]:
    with autocast_off(weight.device.type):
        filters = _as_filters(weight, terms)
        filters, kept = arithmetic(backend, filters, terms).excite(filters, terms)
    excited = _as_stored(filters, terms).to(weight.dtype)
    if terms.transposed_groups is None:
        return excited, kept
    # Regrouping loses the memory format, and a conv's result may depend on it.
    return torch.empty_like(weight).copy_(excited), kept


class ClosedFormExcitation(torch.autograd.Function):
    """W' from W, the fields of :class:`Terms` and the backend.

    Outside of ``torch.compile`` the graph node is *repeatable*: two losses that share an excited
    weight may be differentiated one after the other without ``retain_graph``.
    """

    # Without a `setup_context`, which torch.func would need: it inspects signatures at each call
    # and takes a fifth of a small layer's time.

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *terms_and_backend: Any) -> Tensor:
        *terms, ctx.backend = terms_and_backend
        excited, kept = _forward(weight, Terms(*terms), ctx.backend)
        tensors = (*terms[:_TENSOR_TERMS], *kept)
        ctx.plain_terms = terms[_TENSOR_TERMS:]
        ctx.is_repeatable = not torch.compiler.is_compiling()
        if ctx.is_repeatable:
            repeatable.keep(ctx, weight, tensors)
        else:
            ctx.save_for_backward(weight, *tensors)
        return excited

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = repeatable.kept(ctx) if ctx.is_repeatable else ctx.saved_tensors
        weight, *saved = tensors
        terms = Terms(*saved[:_TENSOR_TERMS], *ctx.plain_terms)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            needed = ctx.needs_input_grad[:-1]
            return *_differentiable_backward(gradient, (weight, *terms), needed), None
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        # The formulas ask for the strides of what comes of the gradient, and a compiler starts over
        # when it is asked: within the context it would leave autocast off for the whole model.
        gradient.is_contiguous()
        with autocast_off(weight.device.type):
            filters, g = _as_filters(weight, terms), _as_filters(gradient, terms)
            by_filters, *by_fcs = arithmetic(ctx.backend, filters, terms).differentiate(
                g, filters, terms, Kept(*saved[_TENSOR_TERMS:]), needed
            )
        by_weight = None
        if by_filters is not None:
            by_weight = _as_stored(by_filters, terms).to(weight.dtype)
        return by_weight, None, *by_fcs, *(None,) * (len(Terms._fields) - 4)


def _differentiable_backward(
    gradient: Tensor, inputs: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of the inputs and of ``gradient``, for ``create_graph``."""
    places = [place for place, is_needed in enumerate(needed) if is_needed]

    def excited(*moving: Tensor) -> Tensor:
        completed = list(inputs)
        for place, value in zip(places, moving, strict=True):
            completed[place] = value
        return staged(*completed)

    pull_back = torch.func.vjp(excited, *(inputs[place] for place in places))[1]
    found = dict(zip(places, pull_back(gradient), strict=True))
    return tuple(found.get(place) for place in range(len(inputs)))


def _as_filters(weight: Tensor, terms: Terms) -> Tensor:
    full = in_full_precision(weight)
    return full if terms.transposed_groups is None else to_filters(full, terms.transposed_groups)


def _as_stored(filters: Tensor, terms: Terms) -> Tensor:
    if terms.transposed_groups is None:
        return filters
    return from_filters(filters, terms.transposed_groups)
