"""Whether the model's layers still hold the excited Parameters, and W' in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from we_surgery.attached.shards import share_again
from we_surgery.attached.transform import follow, is_current, write
from we_surgery.attached.weights import AttachedWeight
from we_surgery.errors import AttachmentError


class Holding:
    """Checks what an attached model holds, and handles differences."""

    def __init__(
        self, model: nn.Module, remember: Callable[[Sequence[AttachedWeight]], None]
    ) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.remember = remember

    def meet(self) -> None:
        """Takes in modules that the model has got since."""
        for name, module in self.model.named_modules():
            self.modules.setdefault(name, module)

    def is_held(self, weight: AttachedWeight) -> bool:
        """Whether the model holds the weight's Parameter where it was."""
        if weight.shard is not None and not self._holds(weight):
            share_again(self.model)
        return self._holds(weight) and not any(self._is_replaced(name) for name, _ in weight.places)

    def _holds(self, weight: AttachedWeight) -> bool:
        for module, name in weight.places:
            own = self.modules[module]._parameters  # of TorchScript it has no `get`
            if name not in own or own[name] is not weight.parameter:
                return False
        return True

    def _is_replaced(self, name: str) -> bool:
        """Whether another module with weights is where this one was, or one that held it."""
        parent, path = self.model, ""
        for key in name.split(".") if name else ():
            path = f"{path}.{key}" if path else key
            now = getattr(parent, key, None)
            parent = self.modules[path]
            if now is not parent:
                if not isinstance(now, nn.Module) or next(now.parameters(), None) is None:
                    return False  # removed, with nothing trained in its place
                return all(each is not self.modules[name] for each in self.model.modules())
        return False

    @torch.no_grad()
    def report(self, weights: Sequence[AttachedWeight]) -> None:
        """Accepts W' at a new address; raises for other values."""
        for weight in weights:
            if not self.is_held(weight):
                raise AttachmentError(
                    f"layer {weight.layer!r} holds another Parameter than when excitation was "
                    "attached, so its weight is no longer trained",
                    "Call `excitation.detach()`, build the optimizer anew and attach again with "
                    '`init="preserve"`. In the next run, attach after whatever replaces layers or '
                    "Parameters (`fully_shard`, `load_state_dict(assign=True)`, parametrizations, "
                    "pruning).",
                )
        changed = [weight.layer for weight in weights if not is_current(weight)]
        if changed:
            more = f" and of {len(changed) - 1} others" if len(changed) > 1 else ""
            raise AttachmentError(
                f"the weight of layer {changed[0]!r}{more} was changed outside of the optimizer's "
                "step",
                "Call `excitation.adopt()` to train on from the current values, or "
                "`excitation.restore()` to undo the change.",
            )
        for weight in weights:
            follow(weight)
        write(weights, advance=False)
        self.remember(weights)

    def hold_again(self, weights: Sequence[AttachedWeight]) -> None:
        """Makes raw weights follow their Parameters; raises where one was replaced."""
        for weight in weights:
            if not self.is_held(weight):
                self.report([weight])
            follow(weight)
