"""State dicts of excited layers whose vanilla class has its own state dict methods.

Such a class (PyTorch Geometric's ``Linear``) would save ``self.weight``, the excited weight. So it
saves and loads a vanilla view with the raw weights, and the keys are renamed afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from we_surgery.converted.views import raw_view
from we_surgery.excitations.names import excitation_name, raw_name


def has_own_state(base: type[nn.Module]) -> bool:
    """Whether a class writes or reads its part of a state dict itself."""
    methods = ("_save_to_state_dict", "_load_from_state_dict", "state_dict", "load_state_dict")
    return any(getattr(base, name) is not getattr(nn.Module, name) for name in methods)


def save_raw(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    """The entries that the vanilla class saves for the raw weights, renamed."""
    saved: Any = OrderedDict()
    raw_view(self)._save_to_state_dict(saved, prefix, keep_vars)
    renamed = {prefix + name: prefix + raw_name(name) for name in self.excited_parameters}
    for key, value in saved.items():
        destination[renamed.get(key, key)] = value


def load_raw(
    self: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Loads the raw weights through the vanilla class, from converted or vanilla entries."""
    names = {prefix + raw_name(name): prefix + name for name in self.excited_parameters}
    not_raw = [n for n in self.excited_parameters if prefix + raw_name(n) not in state_dict]
    excitations = tuple(f"{prefix}{excitation_name(name)}." for name in self.excited_parameters)
    given = {
        names.get(key, key): value
        for key, value in state_dict.items()
        if not key.startswith(excitations)
    }
    view = raw_view(self)
    missing: list[str] = []
    view._load_from_state_dict(
        given, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
    )
    raw_keys = {key: raw for raw, key in names.items()}
    missing_keys += [raw_keys.get(key, key) for key in missing]
    for name, value in view._parameters.items():
        own_name = raw_name(name) if name in self.excited_parameters else name
        self._parameters[own_name] = value
    for name in self.excited_parameters:
        excitation = getattr(self, excitation_name(name))
        if name in not_raw and prefix + name not in missing:
            # A vanilla checkpoint: the excitation keeps its values, except those that depend on
            # the weight.
            kept = excitation.state_dict(prefix=f"{prefix}{excitation_name(name)}.")
            state_dict |= {key: value for key, value in kept.items() if key not in state_dict}
            excitation.prepare(getattr(self, raw_name(name)))
