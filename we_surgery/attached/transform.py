"""E of all attached weights, forward and backward, once per optimizer step.

Where a closed form exists its formulas are called directly and no autograd graph is built. Every
other excitation runs under autograd, whose node keeps the raw weight and no intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from we_surgery.attached.ranks import any_rank
from we_surgery.attached.shard_transform import (
    pull_back_gathered,
    pull_back_rows,
    rows_terms,
    write_gathered,
    write_rows,
)
from we_surgery.attached.shards import local
from we_surgery.attached.weights import AttachedWeight, Excited
from we_surgery.errors import AttachmentError
from we_surgery.excitations import Backend
from we_surgery.excitations.compute.closed_form import excite_into
from we_surgery.excitations.compute.closed_form import pull_back as pull_back_in_closed_form
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Pullback, changes_nothing


def write(weights: Sequence[AttachedWeight], *, advance: bool) -> None:
    """Computes W' = E(raw) into each Parameter's own memory.

    With ``advance`` buffers that follow training, such as a power iteration's, move first.
    """
    closed: dict[Backend, list[tuple[AttachedWeight, ClosedFormInputs]]] = {}
    rows: list[tuple[AttachedWeight, ClosedFormInputs]] = []
    for weight in weights:
        terms = weight.excitation.closed_form(weight.raw)
        if terms is not None and changes_nothing(terms):
            weight.excited = Excited(is_identity=True)
            weight.memory.copy_(local(weight.raw))
        elif weight.shard is not None:
            by_rows = rows_terms(weight.shard, terms)
            if by_rows is None:
                write_gathered(weight, advance=advance)
            else:
                rows.append((weight, by_rows))
        elif terms is not None:
            closed.setdefault(weight.backend, []).append((weight, terms))
        else:
            _write_by_autograd(weight, advance)
    for backend, pairs in closed.items():
        jobs = [(weight.raw, terms, weight.parameter.detach()) for weight, terms in pairs]
        kept = excite_into(jobs, backend)
        for (weight, terms), own in zip(pairs, kept, strict=True):
            weight.excited = Excited(terms, own)
    write_rows(rows)
    for weight in weights:
        weight.written = weight.stamp()


def _write_by_autograd(weight: AttachedWeight, advance: bool) -> None:
    weight.excitation.train(advance)
    with torch.enable_grad():
        excited = weight.excitation(weight.raw)
        # The node and not W' itself, which lies in the Parameter. The view's: torch 2.8 takes no
        # edge to the node of a Function.
        edge = get_gradient_edge(excited.view_as(excited)) if excited.requires_grad else None
    weight.excitation.eval()
    weight.excited = Excited(edge=edge)
    with torch.no_grad():
        weight.parameter.copy_(excited)


def pull_back(weights: Sequence[AttachedWeight], *, in_place: bool) -> None:
    """Assigns the gradients of raw weights and excitations from those of the Parameters.

    ``in_place``, the raw gradients take the memory of W', which is computed anew after the step:
    a second set of gradients would be as large as the weights, and new memory costs more than
    their computation.

    The last weight comes first, as in the backward pass of a model: a parameter that several
    excitations share then sums its gradients in the same order.
    """
    closed: dict[Backend, list[AttachedWeight]] = {}
    for weight in weights:
        weight.raw.grad = None
        for parameter in weight.parameters:
            parameter.grad = None
        if weight.shard is None and weight.excited.terms is not None:
            closed.setdefault(weight.backend, []).append(weight)
    found: dict[int, tuple[Tensor | None, ...]] = {}
    for backend, own in closed.items():
        jobs = [_pullback(weight, in_place=in_place) for weight in own]
        results = pull_back_in_closed_form(backend, jobs)
        found |= zip(map(id, own), results, strict=True)
    rows = [w for w in weights if w.shard is not None and w.excited.terms is not None]
    pull_back_rows(rows, in_place=in_place)
    for weight in reversed(weights):
        if weight.shard is not None and not weight.excited.is_identity:
            if weight.excited.terms is None:
                pull_back_gathered(weight)
        elif weight.excited.terms is not None:
            weight.raw.grad, *by_fcs = found.pop(id(weight))
            _accumulate(weight.excited.terms, by_fcs)
        elif weight.excited.is_identity:
            weight.raw.grad = _gradient(weight)
            for parameter in weight.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        elif weight.excited.edge is not None:
            inputs = [p for p in (weight.raw, *weight.parameters) if p.requires_grad]
            # Retained: an optimizer may ask for the gradients again before it moves the weight.
            torch.autograd.backward(
                weight.excited.edge, _gradient(weight), inputs=inputs, retain_graph=True
            )
        if weight.raw.grad is not None:
            weight.gradient_version = weight.raw.grad._version
        weight.pulled_back = weight.gradient_stamp()


@torch.no_grad()
def is_current(weight: AttachedWeight) -> bool:
    """Whether the Parameter holds E(raw); changes nothing."""
    present = weight.memory.clone()
    write([weight], advance=False)
    excited = weight.memory
    is_same = bool(((excited == present) | (excited.isnan() & present.isnan())).all())
    if not is_same:
        excited.copy_(present)
    return not any_rank([weight], not is_same)


@torch.no_grad()
def follow(weight: AttachedWeight) -> None:
    """Moves raw weight and excitation to where the Parameter is now."""
    parameter, raw = weight.parameter, weight.raw
    if torch.promote_types(parameter.dtype, raw.dtype) != raw.dtype:
        raise AttachmentError(
            f"layer {weight.layer!r} was cast to {parameter.dtype} after excitation was attached, "
            f"and its raw weight has {raw.dtype}",
            "Cast the model before you attach. Now cast it back, or call `excitation.detach()`, "
            'build the optimizer anew and attach again with `init="preserve"`.',
        )
    if weight.shard is not None:
        return
    if raw.device == parameter.device and raw.stride() == parameter.stride():
        return
    raw.data = torch.empty_like(parameter, dtype=raw.dtype).copy_(raw)
    weight.excitation.to(parameter.device)


def drop_gradient(weight: AttachedWeight) -> None:
    """Clears the raw weight's gradient, and the Parameter's if the optimizer cleared the raw one.

    SAM does between its two halves.
    """
    gradient, weight.raw.grad = weight.raw.grad, None
    own = weight.parameter.grad
    if gradient is None:
        weight.parameter.grad = None
        return
    is_written = own is not gradient and gradient._version != weight.gradient_version
    if is_written and own is not None and not gradient.any():
        own.zero_()


def _gradient(weight: AttachedWeight) -> Tensor:
    gradient = weight.parameter.grad
    assert gradient is not None
    dtype = weight.raw.dtype
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _pullback(weight: AttachedWeight, *, in_place: bool) -> Pullback:
    terms, kept = weight.excited.terms, weight.excited.kept
    assert terms is not None
    assert kept is not None
    fcs = (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
    needed = (True, *(tensor is not None and tensor.requires_grad for tensor in fcs))
    target = weight.memory_for_gradient if in_place else None
    return Pullback(_gradient(weight), weight.raw, terms, kept, needed, target)


def _accumulate(terms: ClosedFormInputs, gradients: Iterable[Tensor | None]) -> None:
    """Adds the gradients of A, a, B and b to those parameters."""
    fcs = (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
    for parameter, gradient in zip(fcs, gradients, strict=True):
        if parameter is None or gradient is None:
            continue
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
