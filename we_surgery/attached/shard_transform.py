"""E of weights whose rows lie on several ranks, as ``transform`` is for whole ones; collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from we_surgery.attached.shards import (
    Shard,
    largest_over_ranks,
    local,
    sum_gradients,
    whole,
)
from we_surgery.attached.weights import AttachedWeight, Excited
from we_surgery.excitations.compute.closed_form import excite_into, pull_back
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept, Pullback, changes_nothing
from we_surgery.excitations.mwe import curve_limit


def rows_terms(shard: Shard, terms: ClosedFormInputs | None) -> ClosedFormInputs | None:
    """The closed form of this rank's rows; None if they cannot be computed row by row."""
    if terms is None or terms.transposed_groups is not None:
        return None
    if terms.mwe_epsilon is not None and not terms.detach_max:
        return None
    if terms.gain is None or terms.shift is None:
        return terms
    return terms._replace(gain=shard.cut(terms.gain), shift=shard.cut(terms.shift))


@torch.no_grad()
def write_rows(weights: Sequence[tuple[AttachedWeight, ClosedFormInputs]]) -> None:
    """Computes W' of this rank's rows; MWE's maxima of all weights travel in one message."""
    pending: list[tuple[AttachedWeight, ClosedFormInputs, Tensor, Kept | None]] = []
    for weight, terms in weights:
        linear, kept = _before_curve(weight, terms)
        if terms.mwe_epsilon is None:
            _finish(weight, terms, linear, kept)
        else:
            pending.append((weight, terms, linear, kept))
    by_group: dict[int, list[tuple[AttachedWeight, ClosedFormInputs, Tensor, Kept | None]]] = {}
    for entry in pending:
        by_group.setdefault(id(_shard(entry[0]).group), []).append(entry)
    for entries in by_group.values():
        own = [
            linear.abs().amax() if linear.numel() else linear.sum() for _, _, linear, _ in entries
        ]
        found = largest_over_ranks(own, _shard(entries[0][0]).group)
        for (weight, terms, linear, kept), largest in zip(entries, found, strict=True):
            assert terms.mwe_epsilon is not None
            limit = curve_limit(largest.to(linear.dtype).view(1), terms.mwe_epsilon)
            curved = torch.div(linear, limit).atanh_().mul_(limit)
            kept = Kept(*(kept or (None,) * 5))._replace(limit=limit)
            _finish(weight, terms, curved, kept)


def _before_curve(weight: AttachedWeight, terms: ClosedFormInputs) -> tuple[Tensor, Kept | None]:
    rows = local(weight.raw)
    straight = terms._replace(mwe_epsilon=None)
    if rows.numel() == 0 or changes_nothing(straight):
        return rows, None
    linear = torch.empty_like(rows)
    kept = excite_into([(rows, straight, linear)], weight.backend)[0]
    return linear, kept


def _finish(
    weight: AttachedWeight, terms: ClosedFormInputs, values: Tensor, kept: Kept | None
) -> None:
    weight.memory.copy_(values)
    weight.excited = Excited(terms, kept)


def write_gathered(weight: AttachedWeight, *, advance: bool) -> None:
    """Computes W' whole on each rank, and keeps this rank's rows."""
    weight.excitation.train(advance)
    # An advance needs a gradient to be asked for.
    raw = whole(weight.raw).requires_grad_(advance)
    with torch.set_grad_enabled(advance):
        excited = weight.excitation(raw)
    weight.excitation.eval()
    with torch.no_grad():
        weight.memory.copy_(_shard(weight).cut(excited))
    weight.excited = Excited()


def pull_back_rows(weights: Sequence[AttachedWeight], *, in_place: bool) -> None:
    """Assigns the gradients of rows; those of excitations are summed over the ranks."""
    parameters: dict[int, list[torch.nn.Parameter]] = {}
    for weight in weights:
        shard, terms, kept = _shard(weight), weight.excited.terms, weight.excited.kept
        assert terms is not None
        fcs = (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
        parameters.setdefault(id(shard.group), []).extend(
            p for p in weight.parameters if p.requires_grad
        )
        rows, gradient = local(weight.raw), _gradient(weight)
        found: tuple[Tensor | None, ...] = (gradient,)
        if rows.numel() and kept is not None:
            needed = (True, *(fc is not None and fc.requires_grad for fc in fcs))
            target = weight.memory_for_gradient if in_place else None
            asked = Pullback(gradient, rows, terms, kept, needed, target)
            found = pull_back(weight.backend, [asked])[0]
        assert found[0] is not None
        weight.raw.grad = shard.joined(found[0], weight.raw)
        for parameter, by_fc in zip(fcs, found[1:], strict=False):
            if parameter is not None and by_fc is not None:
                parameter.grad = by_fc.to(parameter.dtype)
    shards = {id(_shard(weight).group): _shard(weight) for weight in weights}
    for key, own in parameters.items():
        sum_gradients(own, shards[key].group)


def pull_back_gathered(weight: AttachedWeight) -> None:
    """Assigns the gradients, computed whole on each rank."""
    assert weight.parameter.grad is not None
    raw = whole(weight.raw).requires_grad_()
    gradient = whole(weight.parameter.grad).to(raw.dtype)
    inputs = [raw, *(p for p in weight.parameters if p.requires_grad)]
    with torch.enable_grad():
        excited = weight.excitation(raw)
    found = torch.autograd.grad(excited, inputs, gradient, allow_unused=True)
    shard = _shard(weight)
    by_raw = torch.zeros_like(raw) if found[0] is None else found[0]
    weight.raw.grad = shard.joined(shard.cut(by_raw).contiguous(), weight.raw)
    for parameter, by_own in zip(inputs[1:], found[1:], strict=True):
        if by_own is not None:
            parameter.grad = by_own if parameter.grad is None else parameter.grad + by_own


def _gradient(weight: AttachedWeight) -> Tensor:
    assert weight.parameter.grad is not None
    return local(weight.parameter.grad).to(weight.raw.dtype)


def _shard(weight: AttachedWeight) -> Shard:
    assert weight.shard is not None
    return weight.shard
