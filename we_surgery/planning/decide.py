"""Makes a plan: what each layer of a model would get, before anything changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.copies import copy_model, drawing_nothing
from we_surgery.errors import InputError, near_matches
from we_surgery.planning.config import make_policy
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rows import Decision, added_parameters
from we_surgery.planning.rules import Rule
from we_surgery.planning.transplant_rows import TransplantDecision, count_parameters, decide
from we_surgery.reading import Form, LayerFacts, Reading, read


def plan(
    model: nn.Module,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] | None = (),
    transplants: Sequence[Any] | None = (),
    example_inputs: Any = None,
    form: Form = "converted",
) -> Plan:
    """Decides what each layer of ``model`` would get. Changes nothing.

    Args:
        model: any model; it is not altered.
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``, or the name of one there.
        rules: exceptions; the last that matches a layer wins.
        transplants: as in :func:`we_surgery.convert`.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments: a forward pass of a copy without weights is recorded on them, which
            gives more precise facts about the model.
        form: ``attached`` plans what :func:`we_surgery.attach` can excite, which is more.

    Returns:
        A plan with one row for each weight of a conv, linear or attention layer.

    Raises:
        InputError: an unknown mode, option or key, or a pattern that matches no layer.
    """
    policy = make_policy(mode, config, rules, transplants)
    vanilla_parameters = count_parameters(model)
    places: tuple[TransplantDecision, ...] = ()
    if policy.transplants:
        # Their layers are read too, and found to be a gate's.
        model = copy_model(model, share_tensors=True)
        with drawing_nothing(model):
            places = decide(model, policy.transplants)
    reading = read(model, example_inputs)
    return Plan(
        mode=policy.mode,
        read_by=reading.read_by,
        read_by_reason=reading.read_by_reason,
        decisions=decide_layers(model, policy, reading, form),
        model_parameters=vanilla_parameters,
        pattern_matches=_count_matches(policy, reading.layers, dict(model.named_modules())),
        transplants=places,
    )


def decide_layers(
    model: nn.Module, policy: Policy, reading: Reading, form: Form = "converted"
) -> tuple[Decision, ...]:
    """One decision per weight, by a policy from the facts about ``model``."""
    modules = dict(model.named_modules())
    parts: dict[Hashable, nn.Module] = {}
    decisions = [
        _decide(policy, facts, modules[facts.module], parts, form) for facts in reading.layers
    ]
    return tuple(_settle_ties(reading.layers, decisions))


def _decide(
    policy: Policy,
    facts: LayerFacts,
    module: nn.Module,
    parts: dict[Hashable, nn.Module],
    form: Form,
) -> Decision:
    stages, reason = policy.decide(facts, module, form)
    return Decision(
        module=facts.module,
        parameter=facts.parameter,
        kind=facts.kind,
        type_name=facts.type_name,
        shape=facts.layout.shape,
        groups=facts.layout.groups,
        excitation=stages,
        reason=reason,
        added_parameters=added_parameters(stages, facts.layout, parts),
    )


def _settle_ties(layers: Sequence[LayerFacts], decisions: Sequence[Decision]) -> list[Decision]:
    """One decision per Parameter: tied layers share an excitation or are all skipped."""
    settled = list(decisions)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, facts in enumerate(layers):
        if facts.tied_modules:
            groups.setdefault(facts.tied_modules, []).append(index)
    for members in groups.values():
        first = settled[members[0]]
        rows = [settled[i] for i in members]
        agree = len({(str(row.excitation), row.layout) for row in rows}) == 1
        verdicts = " and ".join(dict.fromkeys(f"{row.verdict} as {row.kind}" for row in rows))
        for index in members:
            row = settled[index]
            others = ", ".join(repr(settled[i].layer) for i in members if i != index)
            if not agree and any(row.excitation for row in rows):
                reason = f"tied to {others}, and their decisions differ ({verdicts}): left alone"
                settled[index] = replace(row, excitation=[], reason=reason, added_parameters=0)
            elif row.excitation and index != members[0]:
                reason = f"{row.reason}; shares its excitation with tied {first.layer!r}"
                settled[index] = replace(
                    row, reason=reason, added_parameters=0, shared_with=first.layer
                )
    return settled


def _count_matches(
    policy: Policy, layers: Sequence[LayerFacts], modules: Mapping[str, nn.Module]
) -> dict[str, int]:
    names = [facts.name for facts in layers]
    counts: dict[str, int] = {}
    for rule in policy.rules:
        matched = sum(rule.matches(modules[facts.module], facts.name) for facts in layers)
        counts[rule.pattern] = matched
        if not matched:
            raise InputError(
                f"the pattern {rule.pattern!r} matches none of the {len(names)} layers"
                f"{near_matches(rule.pattern.removeprefix('re:'), names)}",
                "Correct it; `we-convert MODEL --dry-run` lists the layers' names.",
            )
    return counts
