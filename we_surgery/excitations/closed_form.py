"""Standardize, LWE, Rescale and MWE as one autograd function, with their gradient in closed form.

Run stage by stage, autograd keeps every intermediate of a layer until its backward pass: three
times the weight for standardized LWE, more with MWE. Here the backward pass starts from the
weight itself and a few numbers a filter, rebuilds the rest and frees it again.

For one layer, W of shape [O, I, *K] with K kernel positions and a fan-in of N = I * K:

    c = W - mean(W)            the mean of each filter                            [O, I, *K]
    r = 1 / (s + epsilon)      s = |c| / sqrt(N - 1), its standard deviation      [O, 1]
    h = relu(u)                u = r / K * sum_K(c) A^T + a, A and a being fc1's  [O, hidden]
    m = sigmoid(h B^T + b)     B and b being fc2's                                [O, I]
    w = p r m c + q            p and q being Rescale's gain and shift             [O, 1]
    W' = M atanh(w / M)        M = (1 + epsilon) max|w|                           []

A stage that is absent drops its line: c = W and r = 1, m = 1, p = 1 and q = 0, W' = w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from we_surgery.excitations import repeatable
from we_surgery.excitations.base import autocast_off, in_full_precision
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.excitations.lwe import located
from we_surgery.excitations.mwe import amplified, curve_limit
from we_surgery.excitations.rescale import rescaled
from we_surgery.excitations.standardize import standardized


class Terms(NamedTuple):
    """What one composition is made of; None for whatever it does not have.

    Attributes:
        standardize_epsilon: 0-d; only for filters of at least two weights.
        fc1_weight: A, ``[hidden, I]``. The four tensors of LWE come together.
        fc1_bias: a, ``[hidden]``.
        fc2_weight: B, ``[I, hidden]``.
        fc2_bias: b, ``[I]``.
        gain: p, ``[O]``. It comes together with ``shift``, and neither is trained.
        shift: q, ``[O]``.
        mwe_epsilon: 0-d.
        detach_max: as in :class:`~we_surgery.excitations.MWE`.
        transposed_groups: as in :class:`~we_surgery.excitations.Composition`.
    """

    standardize_epsilon: Tensor | None = None
    fc1_weight: Tensor | None = None
    fc1_bias: Tensor | None = None
    fc2_weight: Tensor | None = None
    fc2_bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    mwe_epsilon: Tensor | None = None
    detach_max: bool = True
    transposed_groups: int | None = None


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass; None where a stage is absent."""

    mean: Tensor | None
    """``[O, 1, ...]``"""
    norm: Tensor | None
    """|c|, ``[O, 1]``"""
    scale: Tensor | None
    """r, ``[O, 1]``"""
    hidden: Tensor | None
    """h, ``[O, hidden]``"""
    limit: Tensor | None
    """M, 0-d"""


_TENSOR_TERMS = Terms._fields.index("detach_max")


def excite_in_closed_form(weight: Tensor, terms: Terms) -> Tensor:
    """The excited weight, in ``weight``'s shape, dtype and memory format.

    What the stages give one by one, up to rounding. Half precision is computed in float32 and
    rounded once, with autocast off, in both directions. Second derivatives and the transforms
    of ``torch.func`` are taken of :func:`staged`; forward-mode derivatives outside of them
    (``torch.autograd.forward_ad``) are refused by torch.

    Args:
        weight: as the layer stores it, with at least one element.
        terms: the layer's composition.
    """
    # What torch.autograd.Function itself asks before it refuses.
    if torch._C._are_functorch_transforms_active():
        return staged(weight, *terms)
    if not torch.is_grad_enabled():
        return _forward(weight, terms)[0]
    excited: Tensor = ClosedFormExcitation.apply(weight, *terms)
    return excited


def staged(weight: Tensor, *terms: Any) -> Tensor:
    """The same weight by the stages' own formulas, which autograd differentiates at will."""
    given = Terms(*terms)
    filters = _as_filters(weight, given)
    if given.standardize_epsilon is not None:
        filters = standardized(filters, given.standardize_epsilon)
    if given.fc1_weight is not None:
        filters = located(filters, *_fcs(given, filters.dtype))
    if given.gain is not None and given.shift is not None:
        filters = rescaled(filters, given.gain, given.shift)
    if given.mwe_epsilon is not None:
        filters = amplified(filters, given.mwe_epsilon, given.detach_max)
    return _as_stored(filters, given).to(weight.dtype)


def _forward(weight: Tensor, terms: Terms) -> tuple[Tensor, _Kept]:
    with autocast_off(weight.device.type):
        filters, kept = _excite(_as_filters(weight, terms), terms)
    excited = _as_stored(filters, terms).to(weight.dtype)
    if terms.transposed_groups is None:
        return excited, kept
    # Regrouping loses the memory format, and a conv's result may depend on it.
    return torch.empty_like(weight).copy_(excited), kept


class ClosedFormExcitation(torch.autograd.Function):
    """W' from W and the fields of :class:`Terms`.

    Outside of ``torch.compile`` the graph node is *repeatable*: two losses that share an excited
    weight may be differentiated one after the other without ``retain_graph``.
    """

    # Without a `setup_context`, which torch.func would need: it inspects signatures at each call
    # and takes a fifth of a small layer's time.

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *terms: Any) -> Tensor:
        excited, kept = _forward(weight, Terms(*terms))
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
            return _differentiable_backward(gradient, (weight, *terms), ctx.needs_input_grad)
        with autocast_off(weight.device.type):
            kept = _Kept(*saved[_TENSOR_TERMS:])
            return _backward(gradient, weight, terms, kept, ctx.needs_input_grad)


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


def _excite(filters: Tensor, terms: Terms) -> tuple[Tensor, _Kept]:
    """W' in memory of its own, line by line as in this module's docstring."""
    mean = norm = scale = hidden = limit = None
    excited = filters
    if terms.standardize_epsilon is not None:
        dims = tuple(range(1, filters.ndim))
        mean = filters.mean(dims, keepdim=True)
        excited = filters - mean
        # Centred twice, as `standardized` is; the corrected mean is the one to keep.
        correction = excited.mean(dims, keepdim=True)
        excited.sub_(correction)
        mean.add_(correction)
        norm = torch.linalg.vector_norm(excited, dim=dims, keepdim=True).flatten(1)
        to_std = 1 / math.sqrt(_fan_in(filters) - 1)
        scale = torch.add(terms.standardize_epsilon, norm, alpha=to_std).reciprocal_()
    gain, shift = _rescaling(terms, filters)
    factor = _product(scale, gain)
    if terms.fc1_weight is not None:
        fcs = _fcs(terms, filters.dtype)
        to_mean = 1 / _kernel_numel(filters)
        sums = torch.mm(_sum_over_kernel(excited), fcs[0].t())
        if scale is None:
            hidden = torch.add(fcs[1], sums, alpha=to_mean).relu_()
        else:
            hidden = torch.addcmul(fcs[1], sums, scale, value=to_mean).relu_()
        multiplier = _multiplier(hidden, fcs)
        factor = multiplier if factor is None else multiplier.mul_(factor)
    if factor is not None:
        spread = _spread(factor, filters)
        excited = excited * spread if excited is filters else excited.mul_(spread)
    if shift is not None:
        excited.add_(_spread(shift, filters))
    if terms.mwe_epsilon is not None:
        limit = curve_limit(excited, terms.mwe_epsilon)
        ratio = excited / limit if excited is filters else excited.div_(limit)
        excited = ratio.atanh_().mul_(limit)
    return excited, _Kept(mean, norm, scale, hidden, limit)


def _backward(
    gradient: Tensor, weight: Tensor, terms: Terms, kept: _Kept, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs from G, the gradient of W'.

    With sums over a whole filter written sum_F:

        g  = p G / (1 - (w / M)^2), from here on the gradient of r m c
        z  = m (1 - m) sum_K(g c)     dB = z^T (r h)         db = z^T r
        y  = (z B)[h > 0]             dA = v^T sum_K(c)      da = y^T r
        v  = r^2 / K y
        d  = r m g + v A              the gradient of c, were r a constant
        t  = sum_F(m g c) + sum(y (h - a))
        f  = r^2 t / ((N - 1) s)
        dW = d - f c - mean(d - f c)
    """
    filters, g = _as_filters(weight, terms), _as_filters(gradient, terms)
    mean, norm, scale, hidden, limit = kept
    centred = filters if mean is None else filters - mean
    gate = None
    if hidden is not None:
        fcs = _fcs(terms, filters.dtype)
        gate = _Gate(*fcs[:3], hidden, _multiplier(hidden, fcs))
    gain, shift = _rescaling(terms, filters)
    if limit is not None and terms.mwe_epsilon is not None:
        ratio = _ratio(centred, gate, _product(scale, gain), shift, limit)
        g = _through_curve(g, ratio, terms.mwe_epsilon, terms.detach_max)
    if gain is not None:
        g = g * _spread(gain, filters)
    t: Tensor | None = None
    by_fcs: tuple[Tensor | None, ...] = (None,) * 4
    if gate is not None:
        g, t, by_fcs = _through_gate(g, centred, gate, scale, needed)
    elif scale is not None:
        t = (g * centred).sum(tuple(range(1, g.ndim))).unsqueeze(1)
        g = g * _spread(scale, filters)
    others = (None,) * (len(Terms._fields) - 5)
    if not needed[0]:
        return None, None, *by_fcs, *others
    if scale is not None and norm is not None and t is not None:
        # A constant filter has c = 0 and t = 0: clamped, its f is 0 too, and not 0 / 0.
        f = t.mul_(scale).mul_(scale).div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        g.addcmul_(centred, _spread(f, filters), value=-1 / math.sqrt(_fan_in(filters) - 1))
        g.sub_(g.mean(tuple(range(1, g.ndim)), keepdim=True))
    return _as_stored(g, terms).to(weight.dtype), None, *by_fcs, *others


def _through_curve(g: Tensor, ratio: Tensor, epsilon: Tensor, detach_max: bool) -> Tensor:
    """From the gradient of W' to that of w; ``ratio``, w / M, is used up."""
    if detach_max:
        return g / ratio.square_().neg_().add_(1)
    # M moves with the largest weight: dW'/dM = atanh(w / M) - (w / M) / (1 - (w / M)^2). Equally
    # large weights share what comes of it.
    slope = 1 / (1 - ratio * ratio)
    of_limit = (g * (torch.atanh(ratio) - ratio * slope)).sum()
    magnitude = ratio.abs()
    largest = magnitude == magnitude.max()
    share = of_limit * (1 + epsilon) / largest.sum()
    return g * slope + ratio.sign() * largest * share


def _ratio(
    centred: Tensor,
    gate: _Gate | None,
    scale: Tensor | None,
    shift: Tensor | None,
    limit: Tensor,
) -> Tensor:
    """The argument of the curve, w / M, in memory of its own; ``scale`` is r p."""
    factor = 1 / limit if scale is None else _spread(scale / limit, centred)
    if gate is None:
        ratio = centred * factor
    else:
        ratio = (centred * _spread(gate.multiplier, centred)).mul_(factor)
    return ratio if shift is None else ratio.add_(_spread(shift / limit, centred))


class _Gate(NamedTuple):
    """LWE of one layer in full precision, with its h and m."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    hidden: Tensor
    multiplier: Tensor


def _through_gate(
    g: Tensor, centred: Tensor, gate: _Gate, scale: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """d, t, and the gradients of A, a, B and b; ``gate.multiplier`` is used up."""
    multiplier, hidden = gate.multiplier, gate.hidden
    r = hidden.new_ones(hidden.shape[0], 1) if scale is None else scale
    products = g * centred
    z = _sum_over_kernel(products).mul_(multiplier)
    t = z.sum(1, keepdim=True)
    z.addcmul_(z, multiplier, value=-1)
    # With the small matrix in front, the product is a third faster on a CPU.
    by_fc2_weight = _transposed(torch.mm((hidden * r).t(), z)) if needed[4] else None
    by_fc2_bias = torch.mv(z.t(), r.squeeze(1)) if needed[5] else None
    if not (needed[0] or needed[2] or needed[3]):
        return g, t, (None, None, by_fc2_weight, by_fc2_bias)

    y = torch.mm(z, gate.fc2_weight).mul_(hidden > 0)
    t.add_((y * (hidden - gate.fc1_bias)).sum(1, keepdim=True))
    by_fc1_bias = torch.mv(y.t(), r.squeeze(1)) if needed[3] else None
    v = y.mul_(r * r)
    kernel = _kernel_numel(centred)
    if kernel > 1:
        v.div_(kernel)
    by_fc1_weight = torch.mm(v.t(), _sum_over_kernel(centred)) if needed[2] else None
    by_fcs = (by_fc1_weight, by_fc1_bias, by_fc2_weight, by_fc2_bias)
    if not needed[0]:
        return g, t, by_fcs

    if scale is not None:
        multiplier.mul_(scale)
    if kernel == 1:
        d = multiplier.mul_(g.flatten(1)).addmm_(v, gate.fc1_weight).view(centred.shape)
    else:
        spread = _spread(torch.mm(v, gate.fc1_weight), centred)
        d = torch.addcmul(spread, g, _spread(multiplier, centred), out=products)
    return d, t, by_fcs


def _rescaling(terms: Terms, filters: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """P and q as ``[O, 1]``."""
    if terms.gain is None or terms.shift is None:
        return None, None
    gain, shift = (values.to(filters.dtype).unsqueeze(1) for values in (terms.gain, terms.shift))
    return gain, shift


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _transposed(matrix: Tensor) -> Tensor:
    # DDP warns of the strides of a single column that `t` leaves.
    return matrix.t() if matrix.shape[0] > 1 else matrix.view(-1, 1)


def _multiplier(hidden: Tensor, fcs: Sequence[Tensor]) -> Tensor:
    """LWE's m, ``[O, I]``."""
    # Not addmm, which is slower on a CPU by more than the addition.
    return torch.mm(hidden, fcs[2].t()).add_(fcs[3]).sigmoid_()


def _sum_over_kernel(filters: Tensor) -> Tensor:
    """``[O, I]``; the same memory where a kernel has one position."""
    kernel = _kernel_numel(filters)
    if kernel == 1:
        return filters.flatten(1)
    if filters.device.type == "cpu" and filters.is_contiguous():
        # A CPU sums nine neighbours slowly, two to three times slower than it multiplies them
        # by a column of ones.
        ones = filters.new_ones(kernel, 1)
        return torch.mm(filters.reshape(-1, kernel), ones).view(filters.shape[:2])
    return filters.sum(tuple(range(2, filters.ndim)))


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """``[O, 1]`` or ``[O, I]`` made to broadcast over filters ``[O, I, *K]``."""
    return values if like.ndim == 2 else values.view(*values.shape, *[1] * (like.ndim - 2))


def _kernel_numel(filters: Tensor) -> int:
    return math.prod(filters.shape[2:])


def _fan_in(filters: Tensor) -> int:
    return math.prod(filters.shape[1:])


def _fcs(terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, a, B and b in ``dtype``."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
        term if term.dtype == dtype else term.to(dtype)
        for term in terms[1:5]
        if isinstance(term, Tensor)
    )
    return fc1_weight, fc1_bias, fc2_weight, fc2_bias


def _as_filters(weight: Tensor, terms: Terms) -> Tensor:
    full = in_full_precision(weight)
    return full if terms.transposed_groups is None else to_filters(full, terms.transposed_groups)


def _as_stored(filters: Tensor, terms: Terms) -> Tensor:
    if terms.transposed_groups is None:
        return filters
    return from_filters(filters, terms.transposed_groups)
