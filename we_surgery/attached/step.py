"""What happens in a step: raw weights stand in the optimizer's groups while it moves them.

Before the step the gradients of W' are pulled back through E, and each Parameter of the model gives
its entry in the groups, and its state, to its raw weight. Afterwards they change places again and
W' is computed anew. The model and, outside of a step, the optimizer are what the user made them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.attached.guard import Tripwire
from we_surgery.attached.optimizers import companion_group, new_companion
from we_surgery.attached.ranks import any_rank
from we_surgery.attached.shards import local
from we_surgery.attached.transform import drop_gradient, pull_back, write
from we_surgery.attached.weights import HALF, AttachedWeight, ExcitationParameter
from we_surgery.attached.wrappers import STEPS, SWITCHES, with_wrapped
from we_surgery.errors import AttachmentError, InputError, ThawedLayerWarning

Places = dict[int, tuple[list[nn.Parameter], int]]
"""Of an entry by its id: the group's list that holds it, and where."""


@dataclass(eq=False)
class OptimizerStep:
    """The exchange of one optimizer."""

    optimizer: Any  # the outermost one, which the training loop steps
    weights: list[AttachedWeight]
    parameters: list[ExcitationParameter]
    tripwire: Tripwire
    synchronize: Callable[[OptimizerStep], None]  # gives all ranks the same raw weights
    raise_together: Callable[[AttachmentError | None], None]  # raises on all ranks
    clip_raw: float | None = None  # the largest norm of all gradients that the optimizer sees
    depth: int = 0  # how many calls of the optimizer are running, one within the other
    exchanged: list[AttachedWeight] = field(default_factory=list)
    steps: int = 0  # how many have moved a raw weight
    is_hidden: bool = False  # whether this step only makes states, without excitations
    # Frozen or in no optimizer at attach, and not excited therefore.
    left_out: dict[str, nn.Parameter] = field(default_factory=dict)
    is_open: bool = False
    companion: torch.optim.AdamW = field(default_factory=new_companion)
    _last: list[Callable[[], None]] = field(default_factory=list)  # puts the own pre-hooks last
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> None:
        """Makes the optimizer call this before and after each of its steps."""
        self.is_open = True
        for layer in with_wrapped(self.optimizer):
            if not isinstance(layer, torch.optim.Optimizer):
                continue
            before = layer.register_step_pre_hook(_outside_graphs(self._before_step))
            after = layer.register_step_post_hook(_outside_graphs(self._after_step))
            # What others have registered sees the model's own Parameters.
            layer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
            hooks: Any = layer._optimizer_step_pre_hooks
            self._last.append(functools.partial(hooks.move_to_end, before.id))
            self._undo += [before.remove, after.remove]
        # A class may step without calling hooks, and no hook is called where a step raises.
        self._wrap("step", functools.partial(self._stepping, True))
        for name, moves in STEPS.items():
            if hasattr(self.optimizer, name):
                self._wrap(name, functools.partial(self._stepping, moves))
        for name in SWITCHES:
            if hasattr(self.optimizer, name):
                self._wrap(name, self._switching)

    def remove(self) -> None:
        """Undoes :meth:`install`."""
        self.is_open = False
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._last.clear()

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        optimizer, own = self.optimizer, vars(self.optimizer)
        before = own.get(name)
        method = getattr(optimizer, name)

        # A method, as learning-rate schedules expect, and with their marks.
        @functools.wraps(method)
        def wrapped(_: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_open:
                return method(*args, **kwargs)
            return around(method, *args, **kwargs)

        bound = MethodType(wrapped, optimizer)
        setattr(optimizer, name, bound)

        def undo() -> None:
            if vars(optimizer).get(name) is not bound:
                return  # wrapped once more since; it passes calls on
            if before is None:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)

        self._undo.append(undo)

    def _stepping(self, moves: bool, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = self._closure_place(args, kwargs)
        for move in self._last:
            move()
        args, kwargs = self._enter(args, kwargs, place)
        try:
            result = method(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise
        self._leave(moves=moves)
        return result

    def _switching(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.depth == 0:
            self.tripwire.check(self.weights)
            # Lookahead skips what has no gradient.
            live = [weight for weight in self.weights if weight.parameter.grad is not None]
            self._begin(live, self.weights)
        self.depth += 1
        try:
            result = method(*args, **kwargs)
        except BaseException:
            self._abandon()
            raise
        self._leave(moves=False)
        return result

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._refuse_late_gradients()
        own, *rest = args
        found, kwargs = self._enter(tuple(rest), kwargs, self._closure_place(tuple(rest), kwargs))
        return (own, *found), kwargs

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._leave(moves=True)

    @staticmethod
    def _closure_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
        if kwargs.get("closure") is not None:
            return "closure"
        return 0 if args and callable(args[0]) else None

    def _enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.depth += 1
        if self.depth > 1:
            return args, kwargs
        try:
            # Torch's own optimizers begin with the closure, which makes the gradients anew.
            is_lazy = place is not None and type(self.optimizer).__module__.startswith("torch.")
            if not is_lazy:
                self._pull_in()
        except BaseException:
            self._abandon()
            raise
        if place == "closure":
            return args, {**kwargs, "closure": self._around(kwargs["closure"])}
        if place == 0:
            return (self._around(args[0]), *args[1:]), kwargs
        return args, kwargs

    def _around(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The user's closure, run on the model's own weights."""

        @functools.wraps(closure)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._put_back(moves=True)
            result = closure(*args, **kwargs)
            with torch.no_grad():
                self._pull_in()
            return result

        return run

    def _pull_in(self) -> None:
        """Pulls the gradients back and exchanges the weights that have one."""
        live = [weight for weight in self.weights if weight.parameter.grad is not None]
        self._warn_of_left_out()
        gone = [
            weight
            for weight in self.weights
            if weight.parameter.grad is None and not self.tripwire.holding.is_held(weight)
        ]
        if gone:
            self.tripwire.holding.report(gone)  # replaced in the model, so that it gets no gradient
        if not live:
            return
        self.is_hidden = self._is_hidden_step(live)
        if not self.is_hidden:  # which comes between the loading of weights and of states
            self.synchronize(self)
            self._check(live)
        self._begin(live, live)
        if self.clip_raw is not None:
            groups = [*self.optimizer.param_groups, *self.companion.param_groups]
            _clip([p for group in groups for p in group["params"]], self.clip_raw, self.optimizer)

    def _warn_of_left_out(self) -> None:
        found = {layer: p for layer, p in self.left_out.items() if p.grad is not None}
        if not found:
            return
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        thawed = [layer for layer, p in found.items() if id(p) in trained]
        if thawed:
            warnings.warn(
                f"layer {thawed[0]!r} was frozen or not in the optimizer when excitation was "
                "attached; it is trained now, without excitation. Call `excitation.extend()` to "
                "excite it.",
                ThawedLayerWarning,
                stacklevel=2,
            )
            self.left_out = {}

    def _begin(self, live: Sequence[AttachedWeight], moved: Sequence[AttachedWeight]) -> None:
        """Pulls the gradients of ``live`` weights back, and exchanges those that will move."""
        places = self._places(moved)
        try:
            # A hidden step does not compute W' anew.
            pull_back(live, in_place=not self.is_hidden)
        except BaseException:
            write(live, advance=False)
            self.remember(live)
            raise
        self._exchange(moved, places)

    def _check(self, live: Sequence[AttachedWeight]) -> None:
        found = None
        try:
            self.tripwire.check(live)
        except AttachmentError as error:
            found = error
        self.raise_together(found)

    def _refuse_late_gradients(self) -> None:
        """Raises where another hook has changed a gradient that is pulled back already."""
        for weight in self.exchanged:
            if weight.gradient_stamp() != weight.pulled_back:
                raise AttachmentError(
                    f"a hook before the optimizer's step changes the gradient of layer "
                    f"{weight.layer!r}, which is pulled back to the raw weight already",
                    "Change it before `optimizer.step()`, or in the hook change the gradients of "
                    "`optimizer.param_groups`, which then hold the raw weights.",
                )

    def remember(self, weights: Sequence[AttachedWeight]) -> None:
        """Remembers these weights, to compare them before the next step."""
        self.tripwire.remember(weights, self.steps)

    def _is_hidden_step(self, live: Sequence[AttachedWeight]) -> bool:
        """Whether torch steps with a learning rate and gradients of 0, to make states to load."""
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        if any(rate is None or (isinstance(rate, torch.Tensor) and rate.is_cuda) for rate in rates):
            return False  # the value of a tensor on a GPU would have to be waited for
        if any(rate != 0 for rate in rates):
            return False
        moving = any(bool(local(weight.parameter.grad).any()) for weight in live)  # type: ignore[arg-type]
        return not any_rank(live, moving)

    def _places(self, weights: Sequence[AttachedWeight]) -> Places:
        """Where the optimizer holds its entries; raises where it no longer holds a weight's."""
        places = {
            id(parameter): (group["params"], index)
            for group in self.optimizer.param_groups
            for index, parameter in enumerate(group["params"])
        }
        for weight in weights:
            if id(weight.parameter) not in places:
                raise InputError(
                    f"the optimizer no longer holds the weight of layer {weight.layer!r}",
                    "Call `excitation.detach()` before changing the optimizer's parameters, then "
                    'attach again with `init="preserve"`.',
                )
        return places

    def _exchange(self, weights: Sequence[AttachedWeight], places: Places) -> None:
        layers = list(with_wrapped(self.optimizer))
        self.exchanged = list(weights)
        for weight in weights:
            params, index = places[id(weight.parameter)]
            params[index] = weight.raw
            for layer in layers:
                _move_state(layer.state, weight.parameter, weight.raw)
        for own in self.parameters:
            if self.is_hidden and any(own.states):
                continue  # its state has been loaded
            if own.entry is not own.parameter and own.parameter.grad is not None:
                assert own.replicated is not None
                own.entry.grad = own.replicated(own.parameter.grad).data
            group = self.optimizer.param_groups[own.group]
            if own.is_apart:
                apart = companion_group(self.companion, group, own.entry)
                self.companion.param_groups.append(apart)
            else:
                group["params"].append(own.entry)
                if "param_names" in group:
                    group["param_names"].append(own.name)
            own_layers = [self.companion] if own.is_apart else layers
            for layer, state in zip(own_layers, own.states, strict=False):
                if state is not None:
                    layer.state[own.entry] = state

    def _exchange_back(self) -> None:
        layers = list(with_wrapped(self.optimizer))
        back = {id(weight.raw): weight for weight in self.exchanged}
        own = {id(each.entry) for each in self.parameters}
        for group in self.optimizer.param_groups:
            params, names = group["params"], group.get("param_names")
            if names is not None:
                names[:] = [n for n, p in zip(names, params, strict=True) if id(p) not in own]
            params[:] = [
                back[id(p)].parameter if id(p) in back else p for p in params if id(p) not in own
            ]
        for weight in self.exchanged:
            for layer in layers:
                _move_state(layer.state, weight.raw, weight.parameter)
        for each in self.parameters:
            if not (self.is_hidden and any(each.states)):
                own_layers = [self.companion] if each.is_apart else layers
                each.states = [layer.state.pop(each.entry, None) for layer in own_layers]
            each.parameter.grad = each.entry.grad = None
        self.companion.param_groups.clear()
        self.exchanged = []

    def _leave(self, *, moves: bool) -> None:
        self.depth -= 1
        if self.depth == 0:
            if moves and self.exchanged and not self.is_hidden and self.companion.param_groups:
                self.companion.step()
            self._put_back(moves=moves)

    def _put_back(self, *, moves: bool) -> None:
        """Exchanges back and computes W' of the exchanged weights."""
        weights = self.exchanged
        if not weights:
            return
        self._exchange_back()
        for weight in weights:
            drop_gradient(weight)
        if self.is_hidden:
            self.is_hidden = False
            return
        self.steps += moves
        write(weights, advance=moves)
        self.remember(weights)

    def _abandon(self) -> None:
        """After an exception in the optimizer: exchanges back and computes W'."""
        self.depth = 0
        self._put_back(moves=False)


def _outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that torch.compile does not look into, as torch's optimizers keep theirs from it.

    It imports the compiler at the first call and not before.
    """

    def run(*args: Any) -> Any:  # a function, since the mark is put on it
        return hook(*args)

    outside: Callable[..., Any] = torch._disable_dynamo(run)  # type: ignore[attr-defined]
    return outside


def _clip(entries: list[nn.Parameter], bound: float, optimizer: Any) -> None:
    """As ``clip_grad_norm_``, also where the optimizer itself unscales what a scaler scaled."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in entries if p.grad is not None])
    scale = getattr(optimizer, "grad_scale", None)
    torch.nn.utils.clip_grads_with_norm_(entries, bound, norm if scale is None else norm / scale)


def _move_state(state: Any, source: nn.Parameter, target: nn.Parameter) -> None:
    found = state.pop(source, None)
    if found is None:
        return
    state[target] = found
    if source.dtype in HALF and target.dtype not in HALF:
        # Made or loaded for W', as of a vanilla run; the optimizer takes no two dtypes.
        for key, value in found.items():
            if isinstance(value, Tensor) and value.dtype == source.dtype:
                found[key] = value.to(target.dtype)
