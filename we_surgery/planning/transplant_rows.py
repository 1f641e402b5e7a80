"""The transplant rows of a plan: decided, stored, and applied to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from we_surgery._util.settings import filled
from we_surgery.errors import InputError, near_matches
from we_surgery.planning.rules import Rule
from we_surgery.transplants.base import Site, Transplant
from we_surgery.transplants.registry import TRANSPLANTS, build_transplant


@dataclass(frozen=True)
class TransplantDecision:
    """Whether one place of a model gets a transplant.

    Attributes:
        transplant: its name.
        place: see :class:`~we_surgery.transplants.base.Site`.
        type_name: what is there now.
        attach: whether it goes there.
        options: its options.
        reason: why it does or does not.
        added_parameters: parameters that the model gains, less those that it loses.
    """

    transplant: str
    place: str
    type_name: str
    attach: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    added_parameters: int = 0

    @property
    def method(self) -> Transplant:
        """The transplant with its options."""
        return build_transplant(self.transplant, self.options, f"the row of {self.place!r}")

    @property
    def stays(self) -> bool:
        """Whether it is put in and is part of the deployed model."""
        return self.attach and self.method.stays

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)

    @staticmethod
    def from_dict(row: Any, source: str) -> TransplantDecision:
        """The inverse of :meth:`to_dict`."""
        hint = 'A row holds transplant, place and attach; leave one out with `"attach": false`.'
        values = {"type_name": "", **row} if isinstance(row, Mapping) else row
        decision = filled(TransplantDecision, values, f"a transplant in {source}", hint)
        _ = decision.method
        return decision


def decide(model: nn.Module, transplants: Sequence[Transplant]) -> tuple[TransplantDecision, ...]:
    """The places of transplants; each is inserted at once, as it changes the next one's places."""
    rows: list[TransplantDecision] = []
    for transplant in transplants:
        sites = transplant.sites(model)
        chosen = _matching(transplant, sites, model)
        _refuse_nowhere(transplant, chosen)
        asked = [
            TransplantDecision(
                transplant=transplant.name,
                place=site.place,
                type_name=site.type_name,
                attach=site.fits and site in chosen,
                options=transplant.options,
                reason=site.reason if site in chosen else f"does not match {transplant.match!r}",
            )
            for site in sites
        ]
        rows += attach(model, asked)
    return tuple(rows)


def attach(
    model: nn.Module, rows: Sequence[TransplantDecision], *, loading: bool = False
) -> list[TransplantDecision]:
    """Inserts the transplants of the rows."""
    counted: list[TransplantDecision] = []
    for row in rows:
        if not row.attach:
            counted.append(replace(row, added_parameters=0))
            continue
        _refuse_missing(model, row)
        before = count_parameters(model)
        method = row.method
        (method.reattach if loading else method.attach)(model, row.place)
        counted.append(replace(row, added_parameters=count_parameters(model) - before))
    return counted


def attached(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names and places of the transplants that strip removes."""
    for name, transplant in TRANSPLANTS.items():
        for place in transplant.attached(model):
            yield name, place


def detach(model: nn.Module) -> None:
    """Removes the transplants that do not stay."""
    for name, place in list(attached(model)):
        TRANSPLANTS[name].detach(model, place)


def _matching(transplant: Transplant, sites: Sequence[Site], model: nn.Module) -> list[Site]:
    rule = Rule(transplant.match)
    modules = dict(model.named_modules())
    owner = {site.place: modules[site.place.partition("@")[0]] for site in sites}
    chosen = [site for site in sites if rule.matches(owner[site.place], site.place)]
    if sites and not chosen:
        places = [site.place for site in sites]
        raise InputError(
            f"the pattern {rule.pattern!r} matches none of the {len(places)} places of "
            f"{transplant.name}{near_matches(rule.pattern.removeprefix('re:'), places)}",
            "Correct its `match`; without it the plan lists the places.",
        )
    return chosen


def _refuse_nowhere(transplant: Transplant, sites: Sequence[Site]) -> None:
    if not any(site.fits for site in sites):
        why = f": {sites[0].place!r}: {sites[0].reason}" if sites else ""
        raise InputError(
            f"{transplant.name} fits nowhere in the model{why}",
            "Leave it out, or see its page in docs/ for what it needs.",
        )


def _refuse_missing(model: nn.Module, row: TransplantDecision) -> None:
    modules = dict(model.named_modules())
    if row.place.partition("@")[0] not in modules:
        raise InputError(
            f"the plan puts {row.transplant} at {row.place!r}, which does not exist in the model"
            f"{near_matches(row.place, modules)}",
            "Use a plan that was made for this model.",
        )


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a model, without those of lazy layers."""
    return sum(
        0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()
        for parameter in model.parameters()
    )
