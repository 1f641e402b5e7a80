"""The state of an excitation in its optimizer's state dict.

For whole models it lies under ``["state"]["we_surgery"]``: torch keeps an entry there that is not
of a Parameter as it is, also where the optimizer that loads it has no excitation yet. The functions
of ``torch.distributed.checkpoint`` expect a Parameter behind each entry: for them each weight's
part lies in the state of its Parameter, ``["state"][number]["we_surgery"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from we_surgery.attached.registry import STATE_KEY
from we_surgery.attached.state import check_state, joined, parts_of, state_of
from we_surgery.attached.step import OptimizerStep
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.errors import AttachmentError

Load = Callable[[Mapping[str, Any], Sequence[OptimizerStep]], None]
State = dict[str, Any]


def ride(
    step: OptimizerStep, plan: Callable[[], str], load: Load, *, per_parameter: bool
) -> Callable[[], None]:
    """Makes an optimizer's state dict carry the state of its excited weights."""
    taken: list[Mapping[str, Any]] = []

    def add(_: Any, state: State) -> State:
        own = state_of([step], plan())
        if per_parameter:
            return {**state, "state": _beside_parameters(step, state, own)}
        return {**state, "state": {**state["state"], STATE_KEY: own}}

    def take(_: Any, state: State) -> State:
        found = list(parts_in(state["state"]))
        if not found:
            raise AttachmentError(
                "this optimizer state has no state of the excitation: loading it would excite "
                "weights that are excited already, or lose their raw values",
                "Load the state of a run with excitation. To begin excitation on a vanilla run, "
                "load its optimizer state first and attach then, with `resume=False`.",
            )
        own = joined(found)
        check_state(own, step.weights, step.parameters)
        taken.append(own)
        return {**state, "state": _without_parts(state["state"])}

    def load_taken(_: Any) -> None:
        if taken:
            load(taken.pop(), [step])

    undo: list[Callable[[], None]] = []
    for layer in with_wrapped(step.optimizer):
        # timm's Lookahead has no such hooks and saves the optimizer that it wraps.
        if hasattr(layer, "_optimizer_state_dict_post_hooks"):
            undo += [
                layer.register_state_dict_post_hook(add).remove,
                layer.register_load_state_dict_pre_hook(take).remove,
                layer.register_load_state_dict_post_hook(load_taken).remove,
            ]

    def get_off() -> None:
        for each in undo:
            each()

    return get_off


def _beside_parameters(step: OptimizerStep, state: State, own: State) -> dict[Any, Any]:
    groups = step.optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    # All have an entry: torch misses none of a Parameter where there are others.
    states: dict[Any, Any] = {number: {} for number in numbers.values()} | state["state"]
    names = {weight.name: numbers[id(weight.parameter)] for weight in step.weights}
    for name, part in parts_of(own).items():
        states[names[name]] = {**states[names[name]], STATE_KEY: part}
    return states


def parts_in(states: Mapping[Any, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of an excitation's state in an optimizer's states or state dict."""
    if STATE_KEY in states:
        yield states[STATE_KEY]
    for own in states.values():
        if isinstance(own, Mapping) and STATE_KEY in own:
            yield own[STATE_KEY]


def _without_parts(states: Mapping[Any, Any]) -> dict[Any, Any]:
    found = {}
    for key, own in states.items():
        if key == STATE_KEY:
            continue
        if isinstance(own, Mapping) and STATE_KEY in own:
            own = {name: value for name, value in own.items() if name != STATE_KEY}
        found[key] = own
    return found


def loaded_states(optimizers: Sequence[Any]) -> Mapping[str, Any] | None:
    """The states that optimizers without excitation have loaded, as one; None if there is none."""
    layers = [layer for optimizer in optimizers for layer in with_wrapped(optimizer)]
    found = [part for layer in layers for part in parts_in(layer.state)]
    return joined(found) if found else None


def drop_loaded_states(optimizers: Sequence[Any]) -> None:
    """Removes them from the optimizers, once they are loaded."""
    for optimizer in optimizers:
        for layer in with_wrapped(optimizer):
            layer.state.pop(STATE_KEY, None)
            for own in layer.state.values():
                if isinstance(own, dict):
                    own.pop(STATE_KEY, None)
