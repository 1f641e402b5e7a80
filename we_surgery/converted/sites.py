"""The excitations of a plan, checked against the model."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.converted.excite import ExcitationSite
from we_surgery.converted.graphs import refuse_ill_formed_graphs
from we_surgery.converted.proof import check_preserved, refuse_non_finite
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations import Composition, build_excitation
from we_surgery.excitations.base import in_full_precision
from we_surgery.planning.plans import Plan
from we_surgery.planning.rows import Decision
from we_surgery.reading import Form, LayerFacts, converted_obstacle_of, obstacle_of, read_tree

logger = logging.getLogger(__name__)

Init = Literal["paper", "preserve"]
Start = Literal["on", "paused"]


def build_sites(
    model: nn.Module,
    plan: Plan,
    init: Init | None = None,
    start: Start = "on",
    *,
    form: Form = "converted",
) -> list[ExcitationSite]:
    """The excitations a plan asks for, checked against the model, which is not changed."""
    refuse_ill_formed_graphs(model)
    facts = {(f.module, f.parameter): f for f in read_tree(model)}
    names = [fact.name for fact in facts.values()]
    modules = dict(model.named_modules())
    by_parameter: dict[int, tuple[Decision, Composition]] = {}
    sites: list[ExcitationSite] = []
    taken: set[tuple[str, str]] = set()
    parts: dict[Hashable, nn.Module] = {}
    for decision in plan.excited:
        key = (decision.module, decision.parameter)
        fact = facts.get(key) or _bare_parameter(modules.get(decision.module), decision)
        _check_row(decision, fact, names, form)
        if key in taken:
            raise InputError(
                f"the plan names layer {decision.layer!r} twice", "Keep one of its rows."
            )
        taken.add(key)
        parameter = modules[decision.module]._parameters[decision.parameter]
        assert parameter is not None
        refuse_non_finite(decision.layer, parameter, "the weight")
        raw = None
        if id(parameter) in by_parameter:
            first, excitation = by_parameter[id(parameter)]
            if str(first.excitation) != str(decision.excitation):
                raise InputError(
                    f"the plan excites the tied layers {first.layer!r} and {decision.layer!r} "
                    "in different ways",
                    "Give tied layers the same `excitation`, or leave them all alone.",
                )
        else:
            with torch.inference_mode(False):
                weight = parameter.detach()
                weight = in_full_precision(weight) if form == "attached" else weight
                excitation = build_excitation(
                    decision.excitation,
                    decision.layout,
                    device=weight.device,
                    dtype=weight.dtype,
                    parts=parts,
                )
                excitation.prepare(weight)
            by_parameter[id(parameter)] = (decision, excitation)
            if start == "paused":
                pause(excitation, weight, decision.layer, init)
            elif init == "preserve":
                raw = _preserve(excitation, weight, decision.layer)
        sites.append(ExcitationSite(decision.module, decision.parameter, excitation, raw))
    _refuse_half_tied(facts.values(), taken)
    return sites


def pause(excitation: Composition, weight: Tensor, layer: str, init: Init | None = None) -> None:
    """Makes a new excitation the identity for now.

    Without ``init`` it will resume by ``preserve`` if it can, else by ``paper``.
    """
    with torch.inference_mode(False):
        try:
            excitation.pause(weight.detach(), init or "preserve")
        except NotImplementedError as error:
            if init is not None:
                raise no_identity(layer, error) from error
            logger.warning(
                "the weight of layer %r will jump when its excitation starts: %s", layer, error
            )
            excitation.pause(weight.detach(), "paper")


def no_identity(layer: str, error: NotImplementedError) -> InputError:
    """The error for a layer whose excitation cannot start as the identity."""
    return InputError(
        f"layer {layer!r} cannot be initialized as the identity: {error}",
        "Convert with `init='paper'`, or give it another excitation by a rule.",
    )


def _preserve(excitation: Composition, weight: Tensor, layer: str) -> Tensor | None:
    """The raw weight whose excitation equals the weight; None if it is the weight itself."""
    with torch.inference_mode(False):
        try:
            raw = excitation.preserve(weight)
        except NotImplementedError as error:
            raise no_identity(layer, error) from error
        with torch.no_grad():
            check_preserved(layer, weight, excitation(raw))
        # In its own memory, with the weight's strides.
        is_same = not raw.is_meta and torch.equal(raw, weight)
        return None if is_same else torch.empty_like(weight).copy_(raw)


def _bare_parameter(owner: nn.Module | None, decision: Decision) -> LayerFacts | None:
    """Facts of a weight that no conv, linear or attention module owns, as the plan has it."""
    parameter = owner._parameters.get(decision.parameter) if owner is not None else None
    if owner is None or parameter is None:
        return None
    return LayerFacts(
        module=decision.module,
        parameter=decision.parameter,
        kind=decision.kind,
        type_name=decision.type_name,
        layout=replace(decision.layout, shape=tuple(parameter.shape)),
        obstacle=obstacle_of(owner, decision.parameter),
        converted_obstacle=converted_obstacle_of(owner, decision.parameter),
    )


def _check_row(
    decision: Decision, fact: LayerFacts | None, names: Sequence[str], form: Form
) -> None:
    if fact is None:
        raise InputError(
            f"the plan names layer {decision.layer!r}, which does not exist in this model"
            f"{near_matches(decision.layer, names)}",
            "Use a plan that was made for this model.",
        )
    if (fact.kind, fact.layout) != (decision.kind, decision.layout):
        raise InputError(
            f"the plan has layer {decision.layer!r} as {decision.kind} of shape {decision.shape} "
            f"and {decision.groups} groups, the model as {fact.kind} of shape "
            f"{fact.layout.shape} and {fact.layout.groups} groups",
            "Use a plan that was made for this model.",
        )
    obstacle = fact.obstacle_for(form)
    if obstacle is not None:
        raise InputError(
            f"the plan excites layer {decision.layer!r}, which {obstacle}",
            'Give its row `"excitation": []`.',
        )


def _refuse_half_tied(facts: Iterable[LayerFacts], excited: set[tuple[str, str]]) -> None:
    for fact in facts:
        owners = [tuple(path.rpartition(".")[::2]) for path in fact.tied_modules]
        chosen = [owner for owner in owners if owner in excited]
        if chosen and len(chosen) < len(owners):
            left = next(owner for owner in owners if owner not in excited)
            raise InputError(
                f"the plan excites {'.'.join(chosen[0])!r} but not {'.'.join(left)!r}, "
                "which is the same Parameter",
                "Give tied layers the same `excitation`, or leave them all alone.",
            )
