"""The weights that are measured, and the kernels in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from we_surgery._util.copies import copy_model
from we_surgery._util.scripted import own_parameters
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip
from we_surgery.errors import InputError, SurgeryError, near_matches
from we_surgery.excitations import WeightLayout
from we_surgery.excitations.layout import from_filters
from we_surgery.planning.rules import Rule
from we_surgery.reading import read_tree


@dataclass(frozen=True, eq=False)
class MeasuredWeight:
    """One conv or linear weight of a vanilla model.

    Attributes:
        name: the layer's name, as in plans and patterns.
        owners: the modules that share it.
    """

    name: str
    parameter: nn.Parameter
    layout: WeightLayout
    owners: tuple[nn.Module, ...]


def deployed_copy(model: nn.Module) -> nn.Module:
    """A copy of a vanilla model; of a converted one, a stripped copy.

    Analyses measure deployed weights. Setting a raw weight to zero would change the
    standardization and the maximum of all others.
    """
    if is_converted(model):
        return strip(model)
    try:
        return copy_model(model)
    except SurgeryError as error:
        hint = "Use a model that `copy.deepcopy` can copy: analyses measure a copy."
        raise SurgeryError(error.cause, hint) from error


def find_weights(
    model: nn.Module, layers: Sequence[str] = (), *, kinds: str = "conv"
) -> list[MeasuredWeight]:
    """The weights of a vanilla model in order, each Parameter once.

    ``layers`` are patterns as in a :class:`~we_surgery.Rule`, none for all; ``kinds`` is ``conv``,
    ``linear``, or "" for both.
    """
    modules = dict(model.named_modules())
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in modules.values():
        for own in own_parameters(module).values():
            if own is not None:
                owners.setdefault(own, []).append(module)
    found: dict[nn.Parameter, MeasuredWeight] = {}
    for facts in read_tree(model):
        # A parametrized weight is computed, and cannot be written to.
        parameter = own_parameters(modules[facts.module]).get(facts.parameter)
        if facts.kind.startswith(kinds) and parameter is not None and parameter not in found:
            found[parameter] = MeasuredWeight(
                facts.name, parameter, facts.layout, tuple(owners[parameter])
            )
    weights = list(found.values())
    chosen = weights if not layers else _matching(weights, layers)
    if not chosen:
        raise InputError(
            f"the model has no {kinds or 'conv or linear'} weight to measure",
            "Give a model with such layers.",
        )
    return chosen


def _matching(weights: Sequence[MeasuredWeight], layers: Sequence[str]) -> list[MeasuredWeight]:
    matched: set[str] = set()
    for pattern in layers:
        rule = Rule(pattern)
        hits = {w.name for w in weights if any(rule.matches(o, w.name) for o in w.owners)}
        if not hits:
            raise InputError(
                f"the pattern {pattern!r} matches no layer"
                f"{near_matches(pattern, [weight.name for weight in weights])}",
                "Give a layer's name, a glob such as 'layer4.*', re:REGEX or type:CLASS.",
            )
        matched |= hits
    return [weight for weight in weights if weight.name in matched]


def sparsity(model: nn.Module) -> float:
    """The share of exact zeros among the parameters of a model, without biases and norms."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(sum(weight.numel() for weight in weights), 1)


def kernel_mask(layout: WeightLayout, chosen: Tensor) -> Tensor:
    """A bool mask in the weight's stored shape, from chosen kernels ``[O, I]``, bool."""
    spread = chosen.reshape(*chosen.shape, *(1 for _ in layout.kernel_size))
    mask = spread.expand(*chosen.shape, *layout.kernel_size)
    return from_filters(mask, layout.groups) if layout.transposed else mask


def equidistant(size: int, count: int) -> list[int]:
    """``count`` rounded indices from 0 to ``size - 1``; fewer where there are not as many."""
    return sorted(set(torch.linspace(0, size - 1, min(count, size)).round().long().tolist()))
