"""Which Parameters are attached, and to what; optimizers that step them without being attached."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from we_surgery.errors import AttachmentError

if TYPE_CHECKING:
    from torch import nn

STATE_KEY = "we_surgery"
"""Under which an optimizer's state dict holds the excitation's."""


class AttachedDefaults(dict[str, Any]):
    """The ``defaults`` of an optimizer that excitation was attached to.

    They go where the optimizer goes, also into a deep copy or a pickle, which lose its hooks: a
    step of such a copy would train without excitation.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return AttachedDefaults, (dict(self),)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        watch_all_optimizers()


_attached: Any = WeakIdKeyDictionary()
_stepping: weakref.WeakSet[Any] = weakref.WeakSet()
_watching: list[Any] = []


def watch_all_optimizers() -> None:
    """Looks at each step of any optimizer from now on; calling it again changes nothing."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look))


def register(excitation: Any, parameters: list[nn.Parameter], optimizers: list[Any]) -> None:
    """Notes that these optimizers, and no others, may step these Parameters."""
    watch_all_optimizers()
    for parameter in parameters:
        _attached[parameter] = weakref.ref(excitation)
    for optimizer in optimizers:
        _stepping.add(optimizer)


def unregister(parameters: list[nn.Parameter], optimizers: list[Any]) -> None:
    """Undoes :func:`register`."""
    for parameter in parameters:
        _attached.pop(parameter, None)
    for optimizer in optimizers:
        _stepping.discard(optimizer)


def excitation_of(parameter: nn.Parameter) -> Any:
    """The excitation that is attached to the Parameter.

    None if there is none, or if it is gone with its optimizer, whose hooks are all that holds it.
    """
    found = _attached.get(parameter)
    if found is not None and found() is not None:
        gc.collect()  # an optimizer and its hooks hold each other
        return found()
    return None


def _states(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    return (own for own in optimizer.state.values() if isinstance(own, dict))


def _look(optimizer: Optimizer, *_: Any) -> None:
    if optimizer in _stepping:
        return
    is_copy = isinstance(optimizer.defaults, AttachedDefaults) or STATE_KEY in optimizer.state
    if is_copy or any(STATE_KEY in own for own in _states(optimizer)):
        raise AttachmentError(
            f"this {type(optimizer).__name__} is a copy of an optimizer with excitation, or has "
            "loaded the state of one, and has no excitation attached: its step would train the "
            "vanilla weights",
            "Call `we_surgery.attach(model, optimizer, ...)` with it before the first step.",
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _attached:
                raise AttachmentError(
                    f"{type(optimizer).__name__} trains a weight whose excitation is attached to "
                    "another optimizer: its step would be lost",
                    "Call `excitation.move_to(optimizer)` to go on with this optimizer. If each "
                    "trains weights of its own, attach to both: `attach(model, [first, second])`.",
                )
