"""The state of an excitation within the state dict of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from we_surgery.attached.registry import STATE_KEY
from we_surgery.attached.state import check_state, state_of
from we_surgery.attached.step import OptimizerStep
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.errors import AttachmentError

Load = Callable[[Mapping[str, Any], Sequence[OptimizerStep]], None]


def ride(step: OptimizerStep, plan: Callable[[], str], load: Load) -> Callable[[], None]:
    """Makes an optimizer's state dict carry the state of its excited weights.

    It lies under ``["state"]["we_surgery"]``: torch keeps an entry there that is not of a
    Parameter as it is, also where the optimizer that loads it has no excitation yet.

    Args:
        step: of the optimizer.
        plan: gives the plan as JSON.
        load: loads a checked state.

    Returns:
        What undoes it.
    """
    taken: list[Mapping[str, Any]] = []

    def add(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        own = state_of(step.weights, step.parameters, plan=plan(), steps=step.steps)
        return {**state, "state": {**state["state"], STATE_KEY: own}}

    def take(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        inner = dict(state["state"])
        own = inner.pop(STATE_KEY, None)
        if own is None:
            raise AttachmentError(
                "this optimizer state has no state of the excitation: loading it would excite "
                "weights that are excited already, or lose their raw values",
                "Load the state of a run with excitation. To begin excitation on a vanilla run, "
                "load its optimizer state first and attach then, with `resume=False`.",
            )
        check_state(own, step.weights, step.parameters)
        taken.append(own)
        return {**state, "state": inner}

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


def loaded_states(optimizers: Sequence[Any]) -> Mapping[str, Any] | None:
    """The states that optimizers without excitation have loaded, as one; None if there is none."""
    found = [
        layer.state[STATE_KEY]
        for optimizer in optimizers
        for layer in with_wrapped(optimizer)
        if STATE_KEY in layer.state
    ]
    if not found:
        return None
    joined = dict(found[0])
    for part in ("weights", "optimizer"):
        joined[part] = {name: own for state in found for name, own in state[part].items()}
    return joined


def drop_loaded_states(optimizers: Sequence[Any]) -> None:
    """Takes them out of the optimizers, once they are at work."""
    for optimizer in optimizers:
        for layer in with_wrapped(optimizer):
            layer.state.pop(STATE_KEY, None)
