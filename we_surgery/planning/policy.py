"""Facts -> decision: the modes, and the rules that make exceptions to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from we_surgery.excitations import EXCITATIONS, Stages, Standardize, check_stage
from we_surgery.excitations.stage_text import SKIP, parse_stages
from we_surgery.planning.rules import Rule
from we_surgery.reading import Form, LayerFacts
from we_surgery.transplants import Transplant


@dataclass(frozen=True)
class Mode:
    """The stages for each kind of layer, under one name.

    Attributes:
        summary: one line about it.
        source: the paper and section or table.
        conv: stage names joined by ``+``, or ``skip``.
        depthwise: of convs whose filters see one input channel.
        shift: of convs fed by a shift.
        linear: of linear and attention layers.
        gate: of layers inside attention gates.
        options: options by stage name.
    """

    summary: str
    source: str
    conv: str
    depthwise: str
    shift: str
    linear: str = "mwe"
    gate: str = SKIP
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, str]:
        """The stages for each kind of layer, by its name in configs."""
        return {cell: getattr(self, cell) for cell in CELLS}


CELLS = ("conv", "depthwise", "shift", "linear", "gate")

MODES: dict[str, Mode] = {
    "lwe": Mode("LWE on convs, MWE on linear layers", "WE paper, section 3.2", "lwe", SKIP, SKIP),
    "mwe": Mode("MWE on every layer", "WE paper, section 3.3", "mwe", "mwe", "mwe"),
    "we": Mode(
        "LWE on convs, MWE on depthwise, shift-fed and linear layers",
        "WE paper, Table 1 (MobileNetV2-WE) and section 4.6",
        *("lwe", "mwe", "mwe"),
    ),
    "lwe+mwe": Mode(
        "LWE, then MWE, on convs; MWE on all others",
        "WE paper, Table 3",
        *("lwe+mwe", "mwe", "mwe"),
    ),
    "thesis": Mode(
        "what the thesis proposes: LWE by CBAM with skips on convs, MWE on linear layers",
        "thesis, section 3.2",
        *("lwe", SKIP, SKIP),
        options={"lwe": {"attention": "cbam", "skip": True, "activation": "leaky_relu"}},
    ),
    "none": Mode("nothing, for transplants alone", "-", SKIP, SKIP, SKIP, linear=SKIP),
}
"""What each mode gives each sort of layer. A linear layer has no kernel locations to weigh,
so it gets MWE (thesis, section 3.5); a depthwise conv's LWE gate would be absorbed by the norm
(WE paper, section 4.2); in a shift-fed conv LWE would always suppress the same part of the
signal (WE paper, section 4.2); gates are left alone in the paper's parameter counts."""

DEFAULT_MODE = "lwe"


@dataclass(frozen=True)
class Policy:
    """How decisions are made: a table of cells, defaults for options, and rules.

    Rules are tried in their order and the last that matches wins; a rule also overrides the
    mode for depthwise, shift-fed, gate and frozen layers. Layers that cannot be excited are always
    skipped; the plan has the reason.

    Attributes:
        mode: the name of the mode the cells started from.
        cells: what conv, depthwise, shift, linear and gate get: stages joined by ``+``, which may
            bring their options, or ``skip``.
        standardize: ``auto`` standardizes the conv weights that a norm follows and that have
            a fan-in over 1; ``on`` all conv weights but depthwise ones; ``off`` none.
        options: options by stage name.
        rules: exceptions, the last match wins.
        transplants: what is inserted into the model first, in this order.
    """

    mode: str = DEFAULT_MODE
    cells: Mapping[str, str] = field(default_factory=lambda: MODES[DEFAULT_MODE].cells)
    standardize: str = "auto"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    transplants: tuple[Transplant, ...] = ()

    def with_rules(self, rules: Sequence[Rule]) -> Policy:
        """This policy with further rules after its own."""
        return replace(self, rules=(*self.rules, *rules))

    def with_transplants(self, transplants: Sequence[Transplant]) -> Policy:
        """This policy with further transplants after its own."""
        return replace(self, transplants=(*self.transplants, *transplants))

    def with_options(self, options: Mapping[str, Mapping[str, Any]]) -> Policy:
        """This policy with further options by stage name, over its own.

        Raises:
            InputError: there is no such stage or option.
        """
        for name, values in options.items():
            check_stage(name, values)
        return replace(self, options=merged_options(self.options, options))

    def decide(
        self, facts: LayerFacts, module: nn.Module, form: Form = "converted"
    ) -> tuple[Stages, str]:
        """The stages of one layer and the reason; no stages if it is skipped."""
        matching = [rule for rule in self.rules if rule.matches(module, facts.name)]
        rule = matching[-1] if matching else None
        obstacle = facts.obstacle_for(form)
        if obstacle is not None:
            asked = f"rule {rule.pattern!r} matches, but it " if rule is not None else ""
            return [], asked + obstacle
        cell, reason = _cell_of(facts)
        excite = self.cells[cell]
        if rule is not None and rule.excite is not None:
            excite, reason = rule.excite, f"rule {rule.pattern!r}"
        elif facts.frozen:
            return [], "frozen: its weight does not require a gradient"
        elif facts.no_gradient:
            return [], "gets no gradient: it is only used under `torch.no_grad()`"
        elif facts.reads == 0:
            return [], "not used in the recorded forward"
        elif facts.constant_input:
            return [], "applied to a constant alone, such as a table of positions"
        elif rule is not None:
            reason = f"{reason}; options of rule {rule.pattern!r}"
        stages = parse_stages(excite, reason)
        if not stages:
            return [], reason
        options = merged_options(self.options, stages)
        if rule is not None:
            options = merged_options(options, rule.options)
        names = list(stages)
        wanted = (rule.standardize if rule is not None else None) or self.standardize
        explicit = rule is not None and rule.standardize is not None
        for name in list(names):
            unfit = EXCITATIONS[name].unsupported_reason(facts.layout, options[name])
            if unfit is not None:
                names.remove(name)
                reason = f"{reason}; not {name}: it {unfit}"
        takes_it = wanted == "on" or any(EXCITATIONS[name].takes_standardized for name in names)
        if takes_it and names and all(EXCITATIONS[n].order != Standardize.order for n in names):
            standardized, why = _standardizes(facts, cell, wanted, explicit)
            if standardized:
                names.insert(0, Standardize.name)
            if why:
                reason = f"{reason}; {why}"
        return [{name: options.get(name, {})} for name in names], reason


def merged_options(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Options by stage; those of ``second`` win."""
    names = dict.fromkeys((*first, *second))
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in names}


def _cell_of(facts: LayerFacts) -> tuple[str, str]:
    """The kind of a layer in the mode's table, and why."""
    if facts.gate is not None:
        return "gate", f"inside an attention gate ({facts.gate})"
    if facts.shift is not None and facts.kind.startswith("conv"):
        return "shift", f"shift-fed: {facts.shift}"
    if facts.has_single_channel_groups:
        if facts.layout.groups > 1:
            return "depthwise", "depthwise: one input channel a group"
        return "depthwise", "has a single input channel, which leaves no location to weigh"
    if facts.kind.startswith("conv"):
        return "conv", "conv"
    reason = "linear: no kernel locations" if facts.kind.startswith("linear") else "attention"
    return "linear", f"{reason}; shift-fed: {facts.shift}" if facts.shift is not None else reason


def _standardizes(facts: LayerFacts, cell: str, wanted: str, explicit: bool) -> tuple[bool, str]:
    """Whether the weight is standardized first, and a reason if there is one."""
    if wanted == "off":
        return False, ""
    if facts.layout.fan_in < 2:
        return False, "fan-in 1, not standardized" if wanted == "on" else ""
    if explicit and wanted == "on":
        return True, ""
    if cell in ("linear", "depthwise") or not facts.kind.startswith("conv"):
        return False, ""
    if facts.standardizes_itself:
        return False, "its class standardizes the weight itself"
    if wanted == "on":
        return True, ""
    if facts.followed_by_norm:
        return True, f"standardized: {facts.norm_evidence}"
    after = f" ({facts.norm_evidence} follows)" if facts.norm_evidence else ""
    return False, f"not standardized: no norm after it{after}"
