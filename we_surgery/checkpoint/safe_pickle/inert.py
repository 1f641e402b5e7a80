"""Stand-ins for objects that a checkpoint holds beside its weights: configs, logs, optimizers.

Such a file may name classes of any package. They are not imported: objects without behavior replace
theirs, and only unused parts of a checkpoint may hold them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from we_surgery.checkpoint.safe_pickle.scan import Actions, Made, Name
from we_surgery.checkpoint.safe_pickle.soundness import everything_in

# By this, pickle finds a method of a class; of a stand-in alone.
GETATTR = "builtins.getattr"

# Plain data of Python and numpy that such files hold, and its constructors.
_PLAIN = {
    "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list",
    "builtins.object", "builtins.range", "builtins.slice", "collections.defaultdict",
    "collections.deque", "datetime.date", "datetime.datetime", "datetime.time",
    "datetime.timedelta", "datetime.timezone", "decimal.Decimal", "fractions.Fraction",
    "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "types.SimpleNamespace", "uuid.UUID",
}  # fmt: skip
_NUMPY = {"_reconstruct", "_frombuffer"}
_KNOWN = {"torch", "torchvision", "timm", "numpy", "we_surgery", *sys.stdlib_module_names}
_NEVER_LAYERS = (
    "numpy.random",
    "torch.optim",
    "torch.amp",
    "torch.cuda.amp",
    "timm.optim",
    "timm.scheduler",
)


class Inert:
    """Whatever stood in the file; of it only whether it had the state of an ``nn.Module``."""

    was_module = False

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.was_module = any(isinstance(part, dict) and "_parameters" in part for part in parts)


def may_stand_in(name: Name | None) -> bool:
    """Whether an object of this name may be replaced by a stand-in."""
    if name is None:
        return False
    package = name.module.partition(".")[0]
    if package == "numpy" and name.name in _NUMPY:
        return True
    is_never_a_layer = f"{name.module}.".startswith(tuple(f"{m}." for m in _NEVER_LAYERS))
    return is_never_a_layer or package not in _KNOWN or name.path in _PLAIN or name.path == GETATTR


def is_inert(value: Any, names: Collection[str]) -> bool:
    """Whether what a pickle has here is a stand-in, or made by one; ``names`` are theirs."""
    while isinstance(value, Made):
        value = value.by
    return isinstance(value, Name) and value.path in names


def stand_ins(names: Collection[str], actions: Actions) -> dict[str, type]:
    """A class per name whose objects accept what the pickle puts into them.

    Torch fills only its own objects, lists and dicts.
    """
    found: dict[str, type] = {}
    for path in names:
        methods: dict[str, Any] = {}
        for made, targets in ((OrderedDict, actions.filled), (list, actions.extended)):
            if any(isinstance(t.by, Name) and t.by.path == path for t in targets):
                methods["__new__"] = lambda cls, *arguments, made=made: made()
        found[path] = type(path.rpartition(".")[2], (Inert,), methods)
    return found


def holds_only_weights_aside(found: Any) -> bool:
    """Whether no model and no tensor of a file is a stand-in, or holds one, and it has tensors."""
    if not isinstance(found, Mapping):
        return False
    everything = list(everything_in(found))
    used = [value for value in everything if isinstance(value, nn.Module | Tensor)]
    if not any(isinstance(value, Tensor) for value in used):
        return False
    if any(isinstance(value, Inert) and value.was_module for value in everything):
        return False
    return not any(
        isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert))
        for value in everything_in(*used)
    )
