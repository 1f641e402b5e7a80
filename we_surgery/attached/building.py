"""From a plan to attached weights and to the parameters that their optimizer trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from we_surgery.attached.optimizers import group_for, start_early_state
from we_surgery.attached.shard_transform import rows_terms
from we_surgery.attached.shards import is_sharded, shard_of, share_again, whole_model
from we_surgery.attached.weights import (
    AttachedWeight,
    ExcitationParameter,
    optimizer_of,
    raw_like,
)
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.converted.sites import Init, Start, build_sites
from we_surgery.excitations import Backend
from we_surgery.planning.plans import Plan

logger = logging.getLogger(__name__)

Trained = tuple[AttachedWeight, Any]
"""A weight, and the optimizer that trains it."""


@dataclass(frozen=True)
class Building:
    """How excitations are built, at first and for layers unfrozen later."""

    model: nn.Module
    optimizers: Sequence[Any]
    init: Init | None
    start: Start
    backend: Backend

    def readable_model(self) -> nn.Module:
        """The model, or a view with whole Parameters if it is sharded (then collective)."""
        if not any(is_sharded(parameter) for parameter in self.model.parameters()):
            return self.model
        share_again(self.model)
        return whole_model(self.model)

    def weights_of(self, plan: Plan) -> list[Trained]:
        """The planned weights that an optimizer trains. The model is not changed."""
        places: dict[int, list[tuple[str, str]]] = {}
        found: list[Trained] = []
        readable = self.readable_model()
        sites = build_sites(readable, plan, self.init, self.start, form="attached")
        for item in sites:
            parameter = self.model.get_submodule(item.module)._parameters[item.parameter]
            assert parameter is not None
            known = places.setdefault(id(parameter), [])
            known.append((item.module, item.parameter))
            layer = item.module or item.parameter
            optimizer = optimizer_of(parameter, self.optimizers, layer)
            if len(known) > 1 or optimizer is None:
                continue
            values = item.raw
            if values is None:
                own = readable.get_submodule(item.module)._parameters[item.parameter]
                assert own is not None
                values = own.detach()
            shard = shard_of(parameter, layer)
            weight = AttachedWeight(
                layer=layer,
                places=(),
                parameter=parameter,
                raw=raw_like(parameter, values, shard),
                excitation=item.excitation,
                shard=shard,
                backend=self.backend,
            )
            found.append((weight, optimizer))
        for weight, _ in found:
            weight.places = tuple(places[id(weight.parameter)])
        if len(found) < len(places):
            logger.warning(
                "%d of %d planned weights are not in the optimizer and are not excited",
                len(places) - len(found),
                len(places),
            )
        return found


_GATHERED = "; gathered on each rank, since it cannot be computed row by row"


NOT_IN_OPTIMIZER = "not in the optimizer"


def as_attached(plan: Plan, weights: Sequence[AttachedWeight]) -> Plan:
    """The plan without weights that no optimizer trains, and a note on sharded ones it gathers."""
    attached = {place for weight in weights for place in weight.places}
    gathered = {
        place
        for weight in weights
        if weight.shard is not None
        and rows_terms(weight.shard, weight.excitation.closed_form(weight.raw)) is None
        for place in weight.places
    }
    rows = []
    for row in plan.decisions:
        place = row.module, row.parameter
        if row.excitation and place not in attached:
            row = replace(row, excitation=[], added_parameters=0, reason=NOT_IN_OPTIMIZER)
        if place in gathered:
            row = replace(row, reason=row.reason.removesuffix(_GATHERED) + _GATHERED)
        rows.append(row)
    return replace(plan, decisions=tuple(rows))


def placed(optimizer: Any, weights: Sequence[AttachedWeight]) -> list[ExcitationParameter]:
    """The excitations' parameters with their groups, chosen as by ``add_to_optimizer``."""
    groups = optimizer.param_groups
    homes = {id(p): group for group in groups for p in group["params"]}
    found: list[ExcitationParameter] = []
    seen: set[int] = set()
    for weight in weights:
        for name, parameter in weight.excitation.named_parameters():
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            home = homes[id(weight.parameter)]
            group = group_for(optimizer, home, parameter)
            place = next(i for i, each in enumerate(groups) if each is (group or home))
            replicated = None if weight.shard is None else weight.shard.replicated
            entry = parameter if replicated is None else replicated(parameter)
            states: list[Any] = [None]
            if group is not None:
                start_early_state(optimizer, entry, group)
                states = [layer.state.pop(entry, None) for layer in with_wrapped(optimizer)]
            found.append(
                ExcitationParameter(
                    f"{weight.name}:{name}",
                    parameter,
                    entry,
                    place,
                    is_apart=group is None,
                    replicated=replicated,
                    states=states,
                )
            )
    return found
