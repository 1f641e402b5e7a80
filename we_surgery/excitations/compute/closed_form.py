"""Standardize, LWE, Rescale and MWE as one autograd function, with their gradient in closed form.

Run stage by stage, autograd keeps every intermediate of a layer until its backward pass: three
times the weight for standardized LWE, more with MWE. Here the backward pass starts from the
weight itself and a few numbers a filter, rebuilds the rest and frees it again. The formulas are in
:mod:`~we_surgery.excitations.formulas`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations import formulas
from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.compute.backends import EAGER, Arithmetic, Backend, arithmetic
from we_surgery.excitations.compute.terms import (
    TENSOR_TERMS,
    Kept,
    Pullback,
    Terms,
    fcs_in,
    tensors_of,
)
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.excitations.lwe import located
from we_surgery.excitations.mwe import amplified
from we_surgery.excitations.repeatable import Remembered
from we_surgery.excitations.rescale import rescaled
from we_surgery.excitations.standardize import standardized


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
        with autocast_off(weight.device.type):
            return staged(weight, *terms)
    if not torch.is_grad_enabled():
        return _forward([(weight, terms)], backend)[0][0]
    return excite_together([(weight, terms)], backend)[0]


def excite_together(
    weights: Sequence[tuple[Tensor, Terms]], backend: Backend
) -> tuple[Tensor, ...]:
    """The same of many weights on one device, by one node of the graph.

    Its backward pass runs when the gradients of all of them have arrived; one that none arrives
    for gives none to its inputs.
    """
    given = itertools.chain(*((weight, *terms) for weight, terms in weights))
    excited: tuple[Tensor, ...] = ClosedFormExcitation.apply(backend, *given)
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
        return _forward([(weight, terms)], "eager")[0][0]
    filters = weight
    with autocast_off(weight.device.type):
        if terms.transposed_groups is not None:
            filters = to_filters(weight, terms.transposed_groups)
        formulas.excite_in_place(filters, terms)
    if terms.transposed_groups is not None:
        weight.copy_(from_filters(filters, terms.transposed_groups))
    return weight


@torch.no_grad()
def excite_into(
    weights: Sequence[tuple[Tensor, Terms, Tensor]], backend: Backend
) -> list[tuple[Tensor, Kept]]:
    """Writes W' of each weight into a tensor, without an autograd graph.

    Eager computes one weight after the other, in the memory of its target where dtype and strides
    allow it; kernels compute all weights of a device together.

    Args:
        weights: each W, its terms, and the target: a tensor of W's shape, of any float dtype.
        backend: as in :func:`excite_in_closed_form`.

    Returns:
        For each weight W and what :func:`pull_back` needs.
    """
    by_device: dict[torch.device, list[int]] = {}
    found: dict[int, tuple[Tensor, Kept]] = {}
    for place, (weight, terms, target) in enumerate(weights):
        if arithmetic(backend, weight, terms) is EAGER:
            found[place] = weight, _excite_one_into(weight, terms, target)
        else:
            by_device.setdefault(weight.device, []).append(place)
    for places in by_device.values():
        results = _forward([weights[place][:2] for place in places], backend)
        for place, (excited, kept) in zip(places, results, strict=True):
            weights[place][2].copy_(excited)
            found[place] = weights[place][0], kept
    return [found[place] for place in range(len(weights))]


def _excite_one_into(weight: Tensor, terms: Terms, target: Tensor) -> Kept:
    is_alike = weight.dtype == target.dtype and weight.stride() == target.stride()
    if terms.transposed_groups is None and is_alike and in_full_precision(weight) is weight:
        with autocast_off(weight.device.type):
            excited, kept = formulas.excite(weight, terms, target)
        if excited is not target:
            target.copy_(excited)
        return kept
    excited, kept = _forward([(weight, terms)], "eager")[0]
    target.copy_(excited)
    return kept


@torch.no_grad()
def pull_back(backend: Backend, asked: Sequence[Pullback]) -> list[tuple[Tensor | None, ...]]:
    """The gradients of W, A, a, B and b from the gradient of each W', without an autograd graph.

    Args:
        backend: as in :func:`excite_in_closed_form`.
        asked: of each weight the gradient of W', W, its terms, what :func:`excite_into` returned,
            and which of the five gradients are needed.
    """
    return [found[:5] for found in _backward(backend, asked)]


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


def _forward(
    weights: Sequence[tuple[Tensor, Terms]], backend: Backend
) -> list[tuple[Tensor, Kept]]:
    with autocast_off(weights[0][0].device.type):
        filters = [(_as_filters(weight, terms), terms) for weight, terms in weights]
        found = _by_arithmetic(backend, filters, lambda one, jobs: one.excite(jobs), filters)
    return [
        (_as_given(excited, weight, terms), kept)
        for (weight, terms), (excited, kept) in zip(weights, found, strict=True)
    ]


def _as_given(filters: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    excited = _as_stored(filters, terms).to(weight.dtype)
    if terms.transposed_groups is None:
        return excited
    # Regrouping loses the memory format, and a conv's result may depend on it.
    return torch.empty_like(weight).copy_(excited)


def _by_arithmetic(
    backend: Backend,
    layers: Sequence[tuple[Tensor, Terms]],
    compute: Callable[[Arithmetic, list[Any]], list[Any]],
    jobs: Sequence[Any],
) -> list[Any]:
    """What ``compute`` makes of the jobs of the layers, those of one arithmetic together."""
    places: dict[Arithmetic, list[int]] = {}
    for place, (filters, terms) in enumerate(layers):
        places.setdefault(arithmetic(backend, filters, terms), []).append(place)
    found: dict[int, Any] = {}
    for one, own in places.items():
        results = compute(one, [jobs[place] for place in own])
        for place, result in zip(own, results, strict=True):
            found[place] = result
    return [found[place] for place in range(len(layers))]


class ClosedFormExcitation(torch.autograd.Function):
    """Each W' from the backend, and each W with the fields of :class:`Terms`.

    Outside of ``torch.compile`` the graph node is *repeatable*: two losses that share an excited
    weight may be differentiated one after the other without ``retain_graph``.
    """

    # Without a `setup_context`, which torch.func would need: it inspects signatures at each call
    # and takes a fifth of a small layer's time.

    @staticmethod
    def forward(ctx: Any, backend: Backend, *given: Any) -> tuple[Tensor, ...]:
        weights = [(weight, Terms(*terms)) for weight, *terms in _in_parts(given, _INPUTS)]
        found = _forward(weights, backend)
        ctx.backend = backend
        ctx.plain_terms = [tuple(terms)[TENSOR_TERMS:] for _, terms in weights]
        saved = [
            (weight, *tensors_of(terms), *kept)
            for (weight, terms), (_, kept) in zip(weights, found, strict=True)
        ]
        ctx.is_repeatable = not torch.compiler.is_compiling()
        if ctx.is_repeatable:
            ctx.set_materialize_grads(False)
            ctx.layers = [Remembered(weight, others) for weight, *others in saved]
        else:
            ctx.save_for_backward(*itertools.chain(*saved))
        return tuple(excited for excited, _ in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        places = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if ctx.is_repeatable:
            saved = [ctx.layers[place].tensors() for place in places]
        else:
            saved = list(_in_parts(ctx.saved_tensors, _SAVED))
        needed = list(_in_parts(ctx.needs_input_grad[1:], _INPUTS))
        asked = [
            Pullback(
                gradients[place],  # type: ignore[arg-type]
                weight,
                Terms(*rest[:TENSOR_TERMS], *ctx.plain_terms[place]),
                Kept(*rest[TENSOR_TERMS:]),
                needed[place],
            )
            for place, (weight, *rest) in zip(places, saved, strict=True)
        ]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = [
                _differentiable_backward(one.gradient, (one.filters, *one.terms), one.needed)
                for one in asked
            ]
        else:
            results = _backward(ctx.backend, asked)
        found = dict(zip(places, results, strict=True))
        nothing = (None,) * _INPUTS
        return None, *itertools.chain(*(found.get(i, nothing) for i in range(len(gradients))))


_INPUTS = 1 + len(Terms._fields)
_SAVED = 1 + TENSOR_TERMS + len(Kept._fields)


def _in_parts(values: Sequence[Any], length: int) -> list[Sequence[Any]]:
    return [values[start : start + length] for start in range(0, len(values), length)]


def _backward(backend: Backend, asked: Sequence[Pullback]) -> list[tuple[Tensor | None, ...]]:
    """The gradients of W and of each of its terms, where they are needed."""
    for one in asked:
        # The formulas ask for the strides of what comes of the gradient, and a compiler starts over
        # when it is asked: within the context it would leave autocast off for the whole model.
        one.gradient.is_contiguous()
    if not asked:
        return []
    with autocast_off(asked[0].filters.device.type):
        jobs = [
            Pullback(
                _as_filters(gradient, terms),
                _as_filters(weight, terms),
                terms,
                kept,
                (needed[0], *needed[1:5]),
            )
            for gradient, weight, terms, kept, needed in asked
        ]
        layers = [(job.filters, job.terms) for job in jobs]
        found = _by_arithmetic(backend, layers, lambda one, own: one.differentiate(own), jobs)
    results = []
    for (by_filters, *by_fcs), (_, weight, terms, _, _) in zip(found, asked, strict=True):
        by_weight = None
        if by_filters is not None:
            by_weight = _as_stored(by_filters, terms).to(weight.dtype)
        results.append((by_weight, *by_fcs, *(None,) * (len(Terms._fields) - 4)))
    return results


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

    with autocast_off(gradient.device.type):
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
