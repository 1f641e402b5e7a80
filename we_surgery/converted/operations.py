"""What surgery can do to a model. Plan, convert, strip and files know operations and no method.

An operation reads its rows of the plan, attaches what they say, and detaches it at strip to what
is deployed. Operations are attached in their order here, for the transplants make layers that
excitation then finds, and detached in the opposite order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from we_surgery.converted.class_swap import change_since_conversion
from we_surgery.converted.fold_in_place import Progress as Progress
from we_surgery.converted.fold_in_place import put_in_place
from we_surgery.converted.graphs import excited_weights, refuse_changed_graphs
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.proof import check_fold
from we_surgery.converted.sites import Init, Start, build_grafts, graft
from we_surgery.errors import SurgeryError
from we_surgery.excitations.names import raw_name
from we_surgery.planning import transplant_rows as rows
from we_surgery.planning.plans import Plan


class Operation(ABC):
    """One kind of surgery."""

    @abstractmethod
    def attach(self, model: nn.Module, plan: Plan, init: Init, start: Start) -> Plan:
        """Does what the plan says, in place.

        Returns:
            The plan with the parameters counted that were added.

        Raises:
            InputError: the plan does not fit the model.
            SurgeryError: a weight holds Inf or NaN.
        """

    @abstractmethod
    def attached(self, model: nn.Module) -> int:
        """In how many places strip would take something off."""

    def refuse_changed(self, model: nn.Module) -> None:  # noqa: B027
        """Raises if something was put on the model after its conversion that strip cannot undo.

        Raises:
            SurgeryError: naming the layer.
        """

    @abstractmethod
    def detach(self, model: nn.Module, reference: nn.Module, progress: Progress | None) -> None:
        """Takes everything off, in place, down to what is deployed.

        Args:
            model: a converted model.
            reference: the model it is a copy of, or itself.
            progress: called with (places done, places in all).

        Raises:
            SurgeryError: the proof failed.
        """


class Transplantation(Operation):
    """Layers replaced or added; see :mod:`we_surgery.transplants`."""

    def attach(self, model: nn.Module, plan: Plan, init: Init, start: Start) -> Plan:
        return replace(plan, transplants=tuple(rows.attach(model, plan.transplants)))

    def attached(self, model: nn.Module) -> int:
        return sum(1 for _ in rows.attached(model))

    def detach(self, model: nn.Module, reference: nn.Module, progress: Progress | None) -> None:
        rows.detach(model)


class WeightExcitation(Operation):
    """Weights computed from raw ones; see :mod:`we_surgery.excitations`."""

    def attach(self, model: nn.Module, plan: Plan, init: Init, start: Start) -> Plan:
        graft(model, build_grafts(model, plan, init, start))
        return plan

    def attached(self, model: nn.Module) -> int:
        return sum(1 for _ in excited_weights(model))

    def refuse_changed(self, model: nn.Module) -> None:
        for name, layer in excited_layers(model):
            change = change_since_conversion(layer)
            if change is not None:
                raise SurgeryError(
                    f"layer {name!r} was changed after its conversion: {change}",
                    "Remove the pruning mask, parametrization or wrapper that was put on it.",
                )
        refuse_changed_graphs(model)
        weights = list(excited_weights(model))
        raw_weights = {id(weight.raw): weight.module for weight in weights}
        own = {(weight.owner, raw_name(weight.parameter)) for weight in weights}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            if id(parameter) in raw_weights and (model.get_submodule(owner), attribute) not in own:
                raise SurgeryError(
                    f"{name!r} was tied to the raw weight of {raw_weights[id(parameter)]!r} after "
                    "its conversion",
                    "Tie layers before converting, so that the plan can decide for all of them.",
                )

    def detach(self, model: nn.Module, reference: nn.Module, progress: Progress | None) -> None:
        # All folds are computed and compared with the excited weights of the reference before the
        # first layer is changed.
        weights = list(excited_weights(model))
        references = {(w.module, w.parameter): w for w in excited_weights(reference)}
        folded: dict[int, Tensor] = {}
        for index, weight in enumerate(weights):
            raw = weight.raw
            if id(raw) not in folded:
                folded[id(raw)] = weight.folded()
            with torch.no_grad():
                excited = references[weight.module, weight.parameter].excited()
            check_fold(weight.name, excited, folded[id(raw)])
            if progress is not None:
                progress(index + 1, len(weights))
        put_in_place(model, weights, folded)


OPERATIONS: tuple[Operation, ...] = (Transplantation(), WeightExcitation())
"""In the order in which they are attached."""
