"""The handle that :func:`we_surgery.attach` returns."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from we_surgery._util.scripted import own_parameters
from we_surgery.attached.building import NOT_IN_OPTIMIZER, Building, Trained, as_attached, placed
from we_surgery.attached.guard import Tripwire
from we_surgery.attached.holding import Holding
from we_surgery.attached.optimizers import start_early_state, supported_optimizers
from we_surgery.attached.ranks import Copies, broadcast
from we_surgery.attached.registry import AttachedDefaults, register, unregister
from we_surgery.attached.riding import ride
from we_surgery.attached.shards import put, whole
from we_surgery.attached.state import check_state, load_state, state_of
from we_surgery.attached.step import OptimizerStep
from we_surgery.attached.transform import is_current, write
from we_surgery.attached.translation import converted_twin, from_converted
from we_surgery.attached.weights import AttachedWeight, ExcitationParameter, optimizer_of
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.converted.state import PLAN_ATTRIBUTE
from we_surgery.errors import AttachmentError, InputError
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.rows import Decision

logger = logging.getLogger(__name__)


class AttachedExcitation:
    """Excitation of a model's weights in the step of its optimizer.

    The model always holds the excited weights W' = E(raw), as ordinary Parameters, and can be
    deployed at any time. This object and the optimizer's state dict hold the raw weights and the
    parameters of E.

    Attributes:
        plan: what each weight got, and why.
        model: the model.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        building: Building,
        *,
        policy: Any,
        example_inputs: Any,
        rides: str,
        clip_raw: float | None,
    ) -> None:
        self.model = model
        self.plan = plan
        self._building = building
        self._policy = policy
        self._example_inputs = example_inputs
        self._rides = rides
        self._clip_raw = clip_raw
        self._weights: list[AttachedWeight] = []
        self._steps: list[OptimizerStep] = []
        self._undo: list[Callable[[], None]] = []
        self._copies = Copies()
        self._holding = Holding(model, self._remember)

    @property
    def _parameters(self) -> list[ExcitationParameter]:
        return [own for step in self._steps for own in step.parameters]

    @property
    def steps(self) -> int:
        """The number of optimizer steps made with excitation."""
        return max((step.steps for step in self._steps), default=0)

    def is_in(self, optimizers: Sequence[Any]) -> bool:
        """Whether it is attached to these (unwrapped) optimizers."""
        return {id(step.optimizer) for step in self._steps} <= set(map(id, optimizers))

    def parameters(self) -> list[nn.Parameter]:
        """The raw weights, then the trained parameters of the excitations."""
        raws = [weight.raw for weight in self._weights]
        return [*raws, *(own.parameter for own in self._parameters)]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """:meth:`parameters` by name: ``conv.weight`` and ``conv.weight:lwe.fc1.weight``."""
        raws = {weight.name: weight.raw for weight in self._weights}
        return raws | {own.name: own.parameter for own in self._parameters}

    def raw_weights(self) -> dict[int, nn.Parameter]:
        """The raw weights by the ``id`` of the model's Parameters that hold their W'."""
        return {id(weight.parameter): weight.raw for weight in self._weights}

    def state_dict(self) -> dict[str, Any]:
        """Raw weights, excitations and their optimizer states: tensors, text and numbers only.

        The optimizer's state dict holds the same.
        """
        return state_of(self._steps, self.plan.to_json())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies a state into this excitation, and W' of it into the model.

        Args:
            state: the result of :meth:`state_dict` of an excitation with the same plan, or the
                state dict of a converted model. Of the latter only raw weights and excitations are
                loaded.

        Raises:
            InputError: ``state`` is not the state of an excitation.
            AttachmentError: ``state`` has other weights or another excitation. Nothing was changed.
        """
        state = from_converted(state, self.state_dict(), self._weights) or state
        check_state(state, self._weights, self._parameters)
        self._load(state, self._steps)

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any], steps: Sequence[OptimizerStep]) -> None:
        """Loads a checked state of the weights of these optimizers."""
        weights = [weight for step in steps for weight in step.weights]
        for step in steps:
            load_state(state, step)
        largest = 0.0
        for weight in weights:
            before = weight.memory.clone()
            write([weight], advance=False)
            if before.numel():
                difference = (weight.memory.float() - before.float()).abs().max()
                largest = max(largest, float(difference))
        for step in steps:
            step.remember(step.weights)
        logger.info(
            "loaded the excitation of %d weights; the model's weights differed by up to %.3g",
            len(weights),
            largest,
        )

    def converted(self) -> nn.Module:
        """Returns a converted copy of the model, whose layers compute W' from raw.

        Use it for analyses and inspection, or to train on in the converted form. Raw weights of
        half-precision layers are rounded to the
        layer's dtype.

        Raises:
            InputError: the model is sharded, or a layer can only be excited in the attached form.
        """
        twin = converted_twin(self.model, self._weights)
        twin.__dict__[PLAN_ATTRIBUTE] = self.plan.to_dict()
        return twin

    @torch.no_grad()
    def restore(self) -> None:
        """Writes W' back into the model's weights, undoing outside changes."""
        self._holding.hold_again(self._weights)
        write(self._weights, advance=False)
        self._remember(self._weights)

    @torch.no_grad()
    def adopt(self) -> None:
        """Accepts the model's current weights, to train on from them.

        For each weight that was changed, the raw weight is set so that its excitation equals the
        current weight, as with ``init="preserve"``.

        Raises:
            AttachmentError: an excitation does not support ``preserve``. Nothing was changed.
        """
        self._holding.hold_again(self._weights)
        changed = [weight for weight in self._weights if not is_current(weight)]
        found = []
        for weight in changed:
            values = whole(weight.parameter).to(weight.raw.dtype)
            try:
                found.append(weight.excitation.preserve(values).clone())
            except NotImplementedError as error:
                raise AttachmentError(
                    f"the weight of layer {weight.layer!r} cannot be taken over: {error}",
                    "Call `excitation.restore()`, or detach and attach again.",
                ) from error
        for weight, raw in zip(changed, found, strict=True):
            put(weight.raw, raw, weight.shard)
        write(self._weights, advance=False)
        self._remember(self._weights)

    @torch.no_grad()
    def resume(self) -> int:
        """Switches excitation on that was attached with ``start="paused"``.

        The model's weights stay the same, except with ``init="paper"``.

        Returns:
            The number of weights that were switched on.
        """
        paused = [weight for weight in self._weights if weight.excitation.is_paused]
        for weight in paused:
            put(weight.raw, weight.excitation.resume(whole(weight.raw)), weight.shard)
        write(paused, advance=True)
        self._remember(paused)
        return len(paused)

    def detach(self) -> None:
        """Stops exciting. The model keeps W' and trains on as a vanilla model.

        The optimizer state of the excited weights is dropped: it belongs to the raw weights, whose
        gradients have another scale.
        """
        for step in self._steps:
            for layer in with_wrapped(step.optimizer):
                for weight in step.weights:
                    layer.state.pop(weight.parameter, None)
            for group in step.optimizer.param_groups:
                for weight in step.weights:
                    if any(weight.parameter is p for p in group["params"]):
                        start_early_state(step.optimizer, weight.parameter, group)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def move_to(self, optimizer: Any) -> None:
        """Moves the excitation to another optimizer of the same weights.

        Use it for a second stage of training. The old optimizer is left as after :meth:`detach`.
        The new one starts without state.

        Args:
            optimizer: as for :func:`we_surgery.attach`.

        Raises:
            InputError: the optimizer is not supported, or does not hold all excited weights.
            AttachmentError: a weight was changed since the last step. Nothing was changed.
        """
        optimizers = supported_optimizers(optimizer)
        found = []
        for weight in self._weights:
            own = optimizer_of(weight.parameter, optimizers, weight.layer)
            if own is None:
                raise InputError(
                    f"the optimizer does not hold the weight of layer {weight.layer!r}",
                    "Make the optimizer from this model's Parameters.",
                )
            found.append((weight, own))
        self._holding.report(self._weights)
        steps = self.steps
        self.detach()
        self._building = replace(self._building, optimizers=optimizers)
        self._weights = []
        self.add(found)
        for step in self._steps:
            step.steps = steps

    def extend(self) -> int:
        """Excites layers that were frozen or not in the optimizer at ``attach``, or did not exist.

        Unfreeze the layers and add them to the optimizer first.

        Returns:
            The number of weights that were added.

        Raises:
            InputError: excitation was attached by a plan, which does not cover these layers.
        """
        if self._policy is None:
            raise InputError(
                "excitation was attached by a plan, which does not cover layers unfrozen later",
                "Detach, and attach with a plan in which they are excited and `resume=False`.",
            )
        readable = self._building.readable_model()
        plan = make_plan(
            readable, config=self._policy, example_inputs=self._example_inputs, form="attached"
        )
        self._holding.meet()
        known = {id(weight.parameter) for weight in self._weights}
        new = [row for row in plan.excited if id(self._parameter_of(row)) not in known]
        found = self._building.weights_of(replace(plan, decisions=tuple(new))) if new else []
        if found:
            rows = {(row.module, row.parameter): row for row in (*self.plan.decisions, *new)}
            weights = [*self._weights, *(weight for weight, _ in found)]
            self.plan = as_attached(replace(self.plan, decisions=tuple(rows.values())), weights)
            self.add(found)
        return len(found)

    def add(self, found: Sequence[Trained], saved: Mapping[str, Any] | None = None) -> None:
        """Begins to excite these weights; for :func:`we_surgery.attach`.

        On a failure everything is as it was.

        Args:
            found: weights, each with its optimizer.
            saved: the state to begin with.
        """
        before = [(weight, weight.memory.clone()) for weight, _ in found]
        known = len(self._weights), len(self._undo)
        try:
            self._weights += [weight for weight, _ in found]
            for optimizer in dict.fromkeys(optimizer for _, optimizer in found):
                self._install(optimizer, [w for w, own in found if own is optimizer])
            self._copies = Copies()
            self._copies.meet(self._weights)
            if saved is not None:
                self.load_state_dict(saved)
            else:
                write([weight for weight, _ in found], advance=True)
                self._remember([weight for weight, _ in found])
        except BaseException:
            del self._weights[known[0] :]
            while len(self._undo) > known[1]:
                self._undo.pop()()
            with torch.no_grad():
                for weight, values in before:
                    weight.memory.copy_(values)
            raise
        self._watch_left_out()
        logger.info("attached the excitation of %d weights", len(found))

    def _install(self, optimizer: Any, weights: list[AttachedWeight]) -> None:
        parameters = [weight.parameter for weight in weights]
        own = placed(optimizer, weights)
        layers = list(with_wrapped(optimizer))
        step = next((each for each in self._steps if each.optimizer is optimizer), None)
        if step is not None:
            grown = step
            undone = len(grown.weights), len(grown.parameters)
            grown.weights += weights
            grown.parameters += own

            def shrink() -> None:
                del grown.weights[undone[0] :], grown.parameters[undone[1] :]

            self._undo.append(shrink)
            register(self, parameters, layers)
            self._undo.append(lambda: unregister(parameters, []))
            return
        tripwire = Tripwire(self._holding)
        step = OptimizerStep(
            optimizer,
            weights,
            own,
            tripwire,
            self._synchronize,
            lambda error: self._copies.raise_together(error),
            self._clip_raw,
        )
        self._steps.append(step)
        self._undo.append(functools.partial(self._steps.remove, step))
        self._undo.append(step.remove)
        step.install()
        register(self, parameters, layers)
        self._undo.append(lambda: unregister(parameters, layers))
        for layer in layers:
            self._mark(layer)
        if self._rides != "separate":
            each = self._rides == "parameter" or any(w.shard is not None for w in weights)
            self._undo.append(
                ride(step, lambda: self.plan.to_json(), self._load, per_parameter=each)
            )

    def _watch_left_out(self) -> None:
        left_out = {}
        for row in self.plan.decisions:
            parameter = self._parameter_of(row)
            is_left_out = row.reason.startswith("frozen") or row.reason == NOT_IN_OPTIMIZER
            if is_left_out and parameter is not None:
                left_out[row.layer] = parameter
        for step in self._steps:
            step.left_out = left_out

    def _parameter_of(self, row: Decision) -> nn.Parameter | None:
        return own_parameters(self._holding.modules[row.module]).get(row.parameter)

    def _mark(self, layer: Any) -> None:
        before = layer.defaults
        layer.defaults = AttachedDefaults(before)

        def undo() -> None:
            layer.defaults = before

        self._undo.append(undo)

    def _synchronize(self, step: OptimizerStep) -> None:
        if self._copies.meet(self._weights):
            for weight in self._weights:
                weight.written = None  # compared with W' of rank 0 before the step
        elif self._copies.are_due(step.steps):
            broadcast(step.weights)
            write(step.weights, advance=False)
            step.remember(step.weights)

    def _remember(self, weights: Sequence[AttachedWeight]) -> None:
        for step in self._steps:
            step.remember([weight for weight in step.weights if weight in weights])
