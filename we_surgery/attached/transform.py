"""E of all attached weights, forward and backward, once per optimizer step.

Where a closed form exists its formulas are called directly and no autograd graph is built. Every
other excitation runs under autograd, whose node keeps the raw weight and no intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from we_surgery.excitations import Composition
from we_surgery.excitations.closed_form import excite_into, pull_back
from we_surgery.excitations.terms import Kept, Pullback, Terms


@dataclass(slots=True)
class Excited:
    """What the forward pass of one weight leaves for its backward pass.

    Attributes:
        terms: the closed form's inputs; None for a weight computed under autograd.
        kept: the closed form's own intermediates, a few numbers per filter.
        edge: autograd's node of W'; None for the closed form, and where nothing is trained.
    """

    terms: Terms | None = None
    kept: Kept | None = None
    edge: GradientEdge | None = None


def excite(
    weights: Sequence[tuple[Composition, nn.Parameter, Tensor]], *, advance: bool
) -> list[Excited]:
    """Writes E(raw) of each weight into its target.

    Args:
        weights: excitation, raw weight and target, a tensor of the raw weight's shape.
        advance: whether buffers that follow training, such as a power iteration's, move first.
    """
    found: list[Excited] = [Excited() for _ in weights]
    closed: dict[str, list[tuple[int, Terms]]] = {}
    for place, (excitation, raw, target) in enumerate(weights):
        with torch.enable_grad():
            terms = excitation.closed_form(raw)
        if terms is not None:
            closed.setdefault(excitation.backend, []).append((place, terms))
            continue
        excitation.train(advance)
        with torch.enable_grad():
            excited = excitation(raw)
            if excited is raw:
                excited = raw.view_as(raw)
        excitation.eval()
        if excited.requires_grad:
            found[place].edge = get_gradient_edge(excited)
        with torch.no_grad():
            target.copy_(excited)
    for backend, places in closed.items():
        asked = [(weights[place][1], terms, weights[place][2]) for place, terms in places]
        results = excite_into(asked, backend)  # type: ignore[arg-type]
        for (place, terms), (_, kept) in zip(places, results, strict=True):
            found[place] = Excited(terms, kept)
    return found


def differentiate(
    weights: Sequence[tuple[Composition, nn.Parameter, Excited, Tensor]],
) -> None:
    """Assigns the gradients of raw weights and excitation parameters.

    The last weight comes first, as in the backward pass of a model: a parameter that several
    excitations share then sums its gradients in the same order.

    Args:
        weights: excitation, raw weight, what :func:`excite` left, and the gradient of W', which
            is not changed.
    """
    for excitation, raw, _, _ in weights:
        raw.grad = None
        for parameter in excitation.parameters():
            parameter.grad = None
    closed: dict[str, list[int]] = {}
    for place, (excitation, _, excited, _) in enumerate(weights):
        if excited.terms is not None:
            closed.setdefault(excitation.backend, []).append(place)
    found: dict[int, tuple[Tensor | None, ...]] = {}
    for backend, places in closed.items():
        asked = [_pullback(*weights[place]) for place in places]
        found |= zip(places, pull_back(backend, asked), strict=True)  # type: ignore[arg-type]
    for place in reversed(range(len(weights))):
        excitation, raw, excited, gradient = weights[place]
        if excited.terms is not None:
            by_raw, *by_fcs = found.pop(place)
            raw.grad = by_raw
            _accumulate(excited.terms, by_fcs)
        elif excited.edge is not None:
            inputs = [p for p in (raw, *excitation.parameters()) if p.requires_grad]
            # Retained: an optimizer may ask for the gradients again before it moves the weight.
            torch.autograd.backward(
                excited.edge, gradient.to(raw.dtype), inputs=inputs, retain_graph=True
            )


def _pullback(
    excitation: Composition, raw: nn.Parameter, excited: Excited, gradient: Tensor
) -> Pullback:
    assert excited.terms is not None
    assert excited.kept is not None
    terms = excited.terms
    fcs = (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
    needed = (raw.requires_grad, *(t is not None and t.requires_grad for t in fcs))
    return Pullback(gradient.to(raw.dtype), raw, terms, excited.kept, needed)


def _accumulate(terms: Terms, gradients: Iterable[Tensor | None]) -> None:
    """Adds the gradients of A, a, B and b to those parameters."""
    fcs = (terms.fc1_weight, terms.fc1_bias, terms.fc2_weight, terms.fc2_bias)
    for parameter, gradient in zip(fcs, gradients, strict=True):
        if parameter is None or gradient is None:
            continue
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
