"""The hooks of a copy, which are not to be called on a trial run.

A deep copy shares a hook that is a function, and a hook may keep what it is given.
"""

from __future__ import annotations

from torch import nn


def drop_hooks(model: nn.Module, *, keep_torchs_own: bool) -> None:
    """Removes the forward and backward hooks of a model.

    Args:
        model: a copy.
        keep_torchs_own: keep those that torch itself has put there, such as ``weight_norm``'s.
    """
    for module in model.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key, hook in list(hooks.items()):
                is_torchs = (getattr(hook, "__module__", None) or "").startswith("torch.")
                if not (keep_torchs_own and is_torchs):
                    del hooks[key]
