"""The formulas of standardize, LWE, Rescale and MWE together, and of their gradient.

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
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept, fcs_in, rescaling
from we_surgery.excitations.mwe import curve_limit

_BLOCK = 2**19
"""Values in one block: about as many as make the cost of a call small beside its work."""


def excite(
    filters: Tensor, inputs: ClosedFormInputs, out: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """W' in ``out`` or in new memory, line by line as in this module's docstring.

    A CPU computes a large weight in blocks of filters, so that nothing but W' is of its size.
    """
    if not is_computed_in_blocks(filters):
        linear, kept = _before_curve(filters, inputs, out)
        if inputs.mwe_epsilon is None:
            return linear, kept
        limit = curve_limit(linear, inputs.mwe_epsilon)
        own = out if linear is filters else linear
        return _curved(linear, limit, own), _with_limit(kept, limit)
    excited = torch.empty_like(filters) if out is None else out
    blocks = _blocks(filters)
    found = [_before_curve(filters[b], _of_block(inputs, b), excited[b]) for b in blocks]
    linears, keeps = zip(*found, strict=True)
    kept = Kept(
        *(None if part[0] is None else torch.cat(part) for part in zip(*keeps, strict=True))
    )
    if inputs.mwe_epsilon is None:
        return excited, kept
    limit = _limit_of_blocks(linears, inputs.mwe_epsilon)
    for block, linear in zip(blocks, linears, strict=True):
        _curved(linear, limit, excited[block])
    return excited, _with_limit(kept, limit)


def _with_limit(kept: Kept, limit: Tensor) -> Kept:
    # torch 2.8 does not compile `_replace`.
    return Kept(kept.mean, kept.norm, kept.scale, kept.hidden, limit)


def is_computed_in_blocks(filters: Tensor) -> bool:
    """Whether :func:`excite` computes a few filters after the other, and not all at once."""
    if filters.numel() <= _BLOCK or filters.device.type != "cpu":
        return False
    # A compiler, or any other observer of operations, sees the formulas without blocks.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(filters) in (Tensor, nn.Parameter)


def excite_in_place(weight: Tensor, inputs: ClosedFormInputs) -> None:
    """W' in the place of W, bit for bit that of :func:`excite`, rounded to W's own dtype.

    It needs little memory beside the weight's own. With MWE each block is computed twice, because
    M must be known before the first block is overwritten.
    """
    blocks = _blocks(weight)
    first = weight[blocks[0]]
    # One for all blocks: an allocator might not reuse the memory of the last block.
    scratch = torch.empty_like(first, dtype=in_full_precision(first[:0]).dtype)

    def linear_in(block: slice) -> Tensor:
        filters = in_full_precision(weight[block])
        return _before_curve(filters, _of_block(inputs, block), scratch[: filters.shape[0]])[0]

    limit = None
    if inputs.mwe_epsilon is not None:
        limit = _limit_of_blocks(map(linear_in, blocks), inputs.mwe_epsilon)
    for block in blocks:
        linear = linear_in(block)
        if limit is not None:
            linear = _curved(linear, limit, linear)
        weight[block] = linear


def _blocks(filters: Tensor) -> list[slice]:
    # With a multiple of 16 rows each block begins at an aligned address, as a copy of it does:
    # matrix products round differently at other addresses.
    rows = max(_BLOCK // _fan_in(filters) // 16 * 16, 16)
    return [slice(start, start + rows) for start in range(0, filters.shape[0], rows)]


def _of_block(inputs: ClosedFormInputs, block: slice) -> ClosedFormInputs:
    if inputs.gain is None or inputs.shift is None:
        return inputs
    return inputs._replace(gain=inputs.gain[block], shift=inputs.shift[block])


def _limit_of_blocks(linears: Iterable[Tensor], epsilon: float) -> Tensor:
    extremes = [torch.stack(torch.aminmax(linear)) for linear in linears]
    return curve_limit(torch.cat(extremes), epsilon)


def _curved(linear: Tensor, limit: Tensor, out: Tensor | None) -> Tensor:
    ratio = linear.div_(limit) if out is linear else torch.div(linear, limit, out=out)
    return ratio.atanh_().mul_(limit)


def _before_curve(
    filters: Tensor, inputs: ClosedFormInputs, out: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """The curve's argument, w, and what is kept besides the curve's M.

    w is ``filters`` itself if MWE is the only stage, otherwise ``out`` or new memory.
    """
    mean = norm = scale = hidden = None
    linear = filters
    if inputs.standardize_epsilon is not None:
        dims = tuple(range(1, filters.ndim))
        mean = filters.mean(dims, keepdim=True)
        linear = torch.sub(filters, mean, out=out)
        # Centred twice, as `standardized` is; the corrected mean is the one to keep.
        correction = linear.mean(dims, keepdim=True)
        linear.sub_(correction)
        mean.add_(correction)
        norm = torch.linalg.vector_norm(linear, dim=dims, keepdim=True).flatten(1)
        to_std = 1 / math.sqrt(_fan_in(filters) - 1)
        scale = (norm * to_std).add_(inputs.standardize_epsilon).reciprocal_()
    gain, shift = rescaling(inputs, filters)
    factor = _product(scale, gain)
    if inputs.fc1_weight is not None:
        fcs = fcs_in(inputs, filters.dtype)
        to_mean = 1 / _kernel_numel(filters)
        sums = _to_hidden(_sum_over_kernel(linear), fcs[0].t())
        if scale is None:
            hidden = torch.add(fcs[1], sums, alpha=to_mean).relu_()
        else:
            hidden = torch.addcmul(fcs[1], sums, scale, value=to_mean).relu_()
        multiplier = _multiplier(hidden, fcs)
        factor = multiplier if factor is None else multiplier.mul_(factor)
    if factor is not None:
        spread = _spread(factor, filters)
        linear = torch.mul(filters, spread, out=out) if linear is filters else linear.mul_(spread)
    if shift is not None:
        linear.add_(_spread(shift, filters))
    return linear, Kept(mean, norm, scale, hidden, None)


def differentiate(
    g: Tensor,
    filters: Tensor,
    inputs: ClosedFormInputs,
    kept: Kept,
    needed: Sequence[bool],
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of W, A, a, B and b from G, the gradient of W'; that of W in ``out``, if given.

    A CPU computes a large weight in blocks of filters, as in :func:`excite`.
    """
    # M's own gradient sums over all filters.
    is_whole = inputs.mwe_epsilon is not None and not inputs.detach_max
    if is_whole or not is_computed_in_blocks(filters):
        return _differentiate(g, filters, inputs, kept, needed, out)
    if needed[0] and out is None:
        out = torch.empty_like(filters)
    by_fcs: list[Tensor | None] = [None] * 4
    for b in _blocks(filters):
        own = Kept(*(part if part is None or part.ndim == 0 else part[b] for part in kept))
        own_out = None if out is None else out[b]
        found = _differentiate(g[b], filters[b], _of_block(inputs, b), own, needed, own_out)
        for place, more in enumerate(found[1:]):
            so_far = by_fcs[place]
            by_fcs[place] = more if so_far is None or more is None else so_far.add_(more)
    return out if needed[0] else None, *by_fcs


def _differentiate(
    g: Tensor,
    filters: Tensor,
    inputs: ClosedFormInputs,
    kept: Kept,
    needed: Sequence[bool],
    out: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As :func:`differentiate`, for all filters at once.

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
    mean, norm, scale, hidden, limit = kept
    centred = filters if mean is None else filters - mean
    gate = None
    if hidden is not None:
        fcs = fcs_in(inputs, filters.dtype)
        gate = _Gate(*fcs[:3], hidden, _multiplier(hidden, fcs))
    gain, shift = rescaling(inputs, filters)
    if limit is not None and inputs.mwe_epsilon is not None:
        ratio = _ratio(centred, gate, _product(scale, gain), shift, limit)
        g = _through_curve(g, ratio, inputs.mwe_epsilon, inputs.detach_max, out)
    if gain is not None:
        g = torch.mul(g, _spread(gain, filters), out=out)
    t: Tensor | None = None
    by_fcs: tuple[Tensor | None, ...] = (None,) * 4
    if gate is not None:
        g, t, by_fcs = _through_gate(g, centred, gate, scale, needed, out)
    elif scale is not None:
        t = (g * centred).sum(tuple(range(1, g.ndim))).unsqueeze(1)
        g = torch.mul(g, _spread(scale, filters), out=out)
    if not needed[0]:
        return None, *by_fcs
    if scale is not None and norm is not None and t is not None:
        # A constant filter has c = 0 and t = 0: clamped, its f is 0 too, and not 0 / 0.
        f = t.mul_(scale).mul_(scale).div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
        g.addcmul_(centred, _spread(f, filters), value=-1 / math.sqrt(_fan_in(filters) - 1))
        g.sub_(g.mean(tuple(range(1, g.ndim)), keepdim=True))
    return g, *by_fcs


def _through_curve(
    g: Tensor, ratio: Tensor, epsilon: float, detach_max: bool, out: Tensor | None
) -> Tensor:
    """From the gradient of W' to that of w; overwrites ``ratio``, w / M."""
    if detach_max:
        return torch.div(g, ratio.square_().neg_().add_(1), out=out)
    # M depends on the largest weight: dW'/dM = atanh(w / M) - (w / M) / (1 - (w / M)^2). If several
    # weights are equally large, they share this gradient.
    slope = 1 / (1 - ratio * ratio)
    of_limit = (g * (torch.atanh(ratio) - ratio * slope)).sum()
    magnitude = ratio.abs()
    largest = magnitude == magnitude.max()
    share = of_limit * (1 + epsilon) / largest.sum()
    return torch.add(g * slope, ratio.sign() * largest * share, out=out)


def _ratio(
    centred: Tensor,
    gate: _Gate | None,
    scale: Tensor | None,
    shift: Tensor | None,
    limit: Tensor,
) -> Tensor:
    """The ratio w / M, in new memory; ``scale`` is r p."""
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
    g: Tensor,
    centred: Tensor,
    gate: _Gate,
    scale: Tensor | None,
    needed: Sequence[bool],
    out: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """d, t, and the gradients of A, a, B and b; overwrites ``gate.multiplier``."""
    multiplier, hidden = gate.multiplier, gate.hidden
    r = hidden.new_ones(hidden.shape[0], 1) if scale is None else scale
    z = _sum_over_kernel(g * centred).mul_(multiplier)
    t = z.sum(1, keepdim=True)
    z.addcmul_(z, multiplier, value=-1)
    # On a CPU the product is a third faster with the small matrix first.
    by_fc2_weight = _transposed(torch.mm((hidden * r).t(), z)) if needed[3] else None
    by_fc2_bias = torch.mv(z.t(), r.squeeze(1)) if needed[4] else None
    if not (needed[0] or needed[1] or needed[2]):
        return g, t, (None, None, by_fc2_weight, by_fc2_bias)

    # h is never negative, so its sign is [h > 0]; a product with booleans takes five times as long.
    y = _to_hidden(z, gate.fc2_weight).mul_(hidden.sign())
    t.add_((y * (hidden - gate.fc1_bias)).sum(1, keepdim=True))
    by_fc1_bias = torch.mv(y.t(), r.squeeze(1)) if needed[2] else None
    v = y.mul_(r * r)
    kernel = _kernel_numel(centred)
    if kernel > 1:
        v.div_(kernel)
    by_fc1_weight = torch.mm(v.t(), _sum_over_kernel(centred)) if needed[1] else None
    by_fcs = (by_fc1_weight, by_fc1_bias, by_fc2_weight, by_fc2_bias)
    if not needed[0]:
        return g, t, by_fcs

    if scale is not None:
        multiplier.mul_(scale)
    if kernel == 1:
        flat = multiplier if out is None else out.view(multiplier.shape)
        torch.addmm(multiplier.mul_(g.flatten(1)), v, gate.fc1_weight, out=flat)
        d = flat.view(centred.shape) if out is None else out
    else:
        spread = _spread(torch.mm(v, gate.fc1_weight), centred)
        d = torch.addcmul(spread, g, _spread(multiplier, centred), out=out)
    return d, t, by_fcs


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def _to_hidden(values: Tensor, matrix: Tensor) -> Tensor:
    """``values @ matrix``, ``[O, I]`` times ``[I, hidden]``."""
    # A CPU vectorizes a product along the last axis of its result. If the hidden channels do not
    # fill whole vectors, it takes up to three times as long as the transposed product.
    if matrix.shape[1] % 16:
        return torch.mm(matrix.t(), values.t()).t()
    return torch.mm(values, matrix)


def _transposed(matrix: Tensor) -> Tensor:
    # DDP warns about the strides that `t` gives a single column.
    return matrix.t() if matrix.shape[0] > 1 else matrix.view(-1, 1)


def _multiplier(hidden: Tensor, fcs: Sequence[Tensor]) -> Tensor:
    """LWE's m, ``[O, I]``."""
    return torch.addmm(fcs[3], hidden, fcs[2].t()).sigmoid_()


def _sum_over_kernel(filters: Tensor) -> Tensor:
    """``[O, I]``; the same memory where a kernel has one position."""
    kernel = _kernel_numel(filters)
    if kernel == 1:
        return filters.flatten(1)
    if (
        filters.device.type == "cpu"
        and not torch.compiler.is_compiling()  # strides are not final while a graph is traced
        and filters.is_contiguous()
    ):
        # On a CPU a sum of nine neighbours takes two to three times as long as their product with
        # a column of ones.
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
