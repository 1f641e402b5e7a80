"""Which names a pickle may use, and what it may do with them.

Allowed: what torch allows, ``nn.Module`` classes of torch, torchvision, timm and we_surgery, and
the few plain data types and functions below, which pickled torchvision and timm models need.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from we_surgery._util.imports import working_folder_importable
from we_surgery.checkpoint.safe_pickle import inert
from we_surgery.checkpoint.safe_pickle.scan import Actions, Call, Made, Name
from we_surgery.converted.layer import PUBLIC_PATH, excited_class
from we_surgery.excitations.names import MadeClass

# Only where layers live: torch.distributed has a Module that makes code from strings, and whole
# frameworks come along with our own callbacks.
_PACKAGES = (
    "torch.nn",
    "torch.ao.nn",
    "torch.ao.quantization",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "timm.layers",
    "timm.models",
    "we_surgery.excitations",
    PUBLIC_PATH,
    "we_surgery.transplants",
)

# Their methods compile code they hold, or join a process group.
_REFUSED_CLASSES: tuple[type, ...] = (
    torch.fx.GraphModule,
    torch.jit.ScriptModule,
    nn.parallel.DistributedDataParallel,
)

# Classes without code of their own in __new__ or __setstate__: numbers in attributes.
_RECORDS = {
    "argparse.Namespace",
    "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
    "torchvision.models.detection._utils.BoxCoder",
    "torchvision.models.detection._utils.BoxLinearCoder",
    "torchvision.models.detection._utils.Matcher",
    "torchvision.models.detection._utils.SSDMatcher",
}
# Functions from tensors to tensors, which models hold as attributes; a file may not call them.
_FUNCTIONS = {
    "torchvision.ops.boxes.box_iou",
    "torchvision.models.optical_flow.raft._pass_through_h",
    "timm.layers.activations.gelu",
}
_ENUMS = {"timm.layers.format.Format"}

# Calling `partial` stores a callable with arguments and calls nothing. A model that holds one
# calls it in its forward, so it may only hold layers, whose constructors make tensors and no
# more.
_PARTIAL = "functools.partial"
_PARTIAL_OVER = ("torch.nn.modules", "torchvision.ops", "timm.layers")

# numpy's scalars, such as a best accuracy, are common in checkpoints. Their dtype may only be
# a number's, for no object or structure can be made of bytes then.
_NUMPY_DTYPE = "numpy.dtype"
_NUMPY_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_NUMBER = re.compile(r"[biufc][0-9]{1,2}")
_NUMBER_STATE = (None, None, None, -1, -1, 0)

# torch's own function that calls its first argument.
_CALLS_ITS_ARGUMENT = "torch._tensor._rebuild_from_type_v2"


class Why(Enum):
    """Why a name is refused; decides on the hint."""

    OTHER_PACKAGE = "from another package"
    NOT_INSTALLED = "cannot be imported here"
    NO_MODULE = "not an nn.Module class"
    MAIN = "defined in the script that saved it"
    WRAPPER = "a wrapper"
    PACKED = "the packed weights of a quantized model"
    MISUSED = "called in a way that torch.save never writes"
    HELD = "a callable that is not a layer, stored where the model would call it"


@dataclass(frozen=True)
class Refusal:
    """A name, or a use of one, that is not allowed."""

    name: str
    why: Why


@dataclass(frozen=True)
class Permitted:
    """The objects of a pickle's names, by their paths, and the refusals.

    Names in ``stood_in`` are refused too, but have stand-ins among ``objects``: the file may be
    opened as a checkpoint that holds them beside its weights.
    """

    objects: dict[str, Any]
    refusals: list[Refusal]
    stood_in: list[Refusal] = field(default_factory=list)


def permit(actions: Actions, unsafe: set[str], allow: Sequence[str] = ()) -> Permitted:
    """Looks up the names in a pickle, and checks each of its calls.

    ``unsafe`` are the paths that torch does not allow by default; ``allow`` are further packages,
    which are imported, and whose ``nn.Module`` classes are allowed.
    """
    objects: dict[str, Any] = {}
    refusals: dict[str, Refusal] = {}
    unexplained = set(unsafe)
    for path, name in actions.names.items():
        # torch reads some of Python 2's names as ours and leaves others.
        known_as = unsafe & {path, name.written}
        unexplained -= known_as
        if known_as:
            found = _find(name, tuple(allow))
            if isinstance(found, Refusal):
                refusals[path] = found
            else:
                objects[path] = found
    refusals |= {path: Refusal(path, Why.OTHER_PACKAGE) for path in sorted(unexplained)}
    stood_in = {
        path: refusal
        for path, refusal in refusals.items()
        if inert.may_stand_in(actions.names.get(path)) and path not in WRAPPERS
    }
    if stood_in.keys() < refusals.keys():
        return Permitted(objects, list(refusals.values()))
    misused = _misused(actions, objects, stood_in, allow)
    if misused.keys() & {_NUMPY_DTYPE, *_NUMPY_SCALARS}:
        # Of text, dates or records: no numbers, and nothing that weights would be made of.
        data = {path for path in objects if path == _NUMPY_DTYPE or path in _NUMPY_SCALARS}
        stood_in |= {path: Refusal(path, Why.MISUSED) for path in sorted(data)}
        misused = _misused(actions, objects, stood_in, allow)
    if misused:
        return Permitted(objects, list((refusals or misused).values()))
    objects |= inert.stand_ins(stood_in, actions)
    return Permitted(objects, [], list(stood_in.values()))


def _misused(
    actions: Actions, objects: dict[str, Any], stood_in: Mapping[str, Refusal], allow: Sequence[str]
) -> dict[str, Refusal]:
    """The permitted names that a pickle uses in ways that are not permitted."""
    found: dict[str, Refusal] = {}
    for call in actions.calls:
        if not _may_call(call, objects, stood_in):
            path = _path(call.function)
            found[path] = Refusal(path, Why.MISUSED)
    for path in actions.held:
        if path not in stood_in and not _may_be_held(objects.get(path), allow):
            found[path] = Refusal(path, Why.HELD)
    for target, state in actions.states:
        if not _may_set_state(target, state, objects, stood_in):
            path = _path(target.by if isinstance(target, Made) else target)
            found[path] = Refusal(path, Why.MISUSED)
    for made in actions.filled:
        is_mapping = isinstance(made.by, Name) and made.by.module == "collections"
        if not is_mapping and not inert.is_inert(made, stood_in):
            path = _path(made.by)
            found[path] = Refusal(path, Why.MISUSED)
    return found


def covers(packages: Sequence[str], module: str) -> bool:
    """Whether ``module`` is one of ``packages`` or lies in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _find(name: Name, allow: tuple[str, ...]) -> Any:
    """The object a name stands for, or a :class:`Refusal`."""
    if name.path == _PARTIAL:
        return functools.partial
    if name.path == _NUMPY_DTYPE or name.path in _NUMPY_SCALARS:
        return _find_in_numpy(name)
    if name.path == "argparse.Namespace":
        return argparse.Namespace
    if name.path in _RECORDS | _FUNCTIONS | _ENUMS:
        return _imported(name, ())
    if name.module == PUBLIC_PATH and (made := MadeClass.parse(name.name)) is not None:
        return _find_made_class(name.path, made, allow)
    return _find_module_class(name, allow)


def _find_module_class(name: Name, allow: tuple[str, ...]) -> Any:
    if name.path == PACKED:
        return Refusal(PACKED, Why.PACKED)
    packages = (*_PACKAGES, *allow)
    if not covers(packages, name.module):
        if name.module == "__main__":
            return Refusal(name.path, Why.MAIN)
        is_ours_to_read = covers(("torch", "torchvision", "timm"), name.module)
        known = is_ours_to_read or name.module.partition(".")[0] in sys.stdlib_module_names
        why = Why.NO_MODULE if known else Why.OTHER_PACKAGE
        return Refusal(name.path, Why.WRAPPER if name.path in WRAPPERS else why)
    return _checked(_imported(name, allow), name, packages)


def _checked(found: Any, name: Name, packages: tuple[str, ...]) -> Any:
    if isinstance(found, Refusal):
        return found
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return Refusal(name.path, Why.NO_MODULE)
    if issubclass(found, _REFUSED_CLASSES):
        return Refusal(name.path, Why.WRAPPER)
    # A package's module may hold classes of other packages, imported for its own use.
    if not covers(packages, found.__module__):
        return Refusal(f"{found.__module__}.{found.__qualname__}", Why.OTHER_PACKAGE)
    return found


def _find_made_class(path: str, made: MadeClass, allow: tuple[str, ...]) -> Any:
    """The class of an excited layer that is made on demand; see ``excited_class``."""
    outer, *nested = made.classes
    base_path = Name(made.module, outer)
    base = _find_module_class(base_path, allow)
    for attribute in nested:
        if isinstance(base, type):
            base = _checked(vars(base).get(attribute), base_path, (*_PACKAGES, *allow))
    if isinstance(base, Refusal):
        return base
    # A property must take a parameter's place and no method's. torch takes no other names either.
    if any(not p or "." in p or p.startswith("__") or hasattr(base, p) for p in made.parameters):
        return Refusal(path, Why.MISUSED)
    return excited_class(base, made.parameters)


def _find_in_numpy(name: Name) -> Any:
    try:
        import numpy
    except ImportError:
        return Refusal(name.path, Why.NOT_INSTALLED)
    # Taken from a scalar because numpy 2 moved it, and warns of its old place.
    return numpy.dtype if name.path == _NUMPY_DTYPE else numpy.float64(0).__reduce__()[0]


def _imported(name: Name, allow: tuple[str, ...]) -> Any:
    if not name.name.isidentifier() or not all(p.isidentifier() for p in name.module.split(".")):
        return Refusal(name.path, Why.NO_MODULE)
    # A package's __main__ is a program; importing it would run it.
    if name.module.endswith(".__main__"):
        return Refusal(name.path, Why.NO_MODULE)
    try:
        importable = working_folder_importable() if covers(allow, name.module) else nullcontext()
        # Old places of classes warn that they moved.
        with warnings.catch_warnings(), importable:
            warnings.simplefilter("ignore")
            module = sys.modules.get(name.module) or importlib.import_module(name.module)
            return getattr(module, name.name)
    except Exception:
        return Refusal(name.path, Why.NOT_INSTALLED)


def _may_call(call: Call, objects: dict[str, Any], stood_in: Mapping[str, Refusal]) -> bool:
    if not isinstance(call.function, Name):
        return False
    path = call.function.path
    if path == inert.GETATTR:
        return _is_tuple(call.arguments) and inert.is_inert(call.arguments[0], stood_in)
    if path in stood_in:
        return True
    if _holds_inert(call.arguments, stood_in):
        return False
    if path == _CALLS_ITS_ARGUMENT:
        called = call.arguments[0] if _is_tuple(call.arguments) else None
        return isinstance(called, Name) and called.path not in (*objects, path)
    if path not in objects:
        # torch's own, which torch checks; but a number may ask some of it for any memory.
        return not (_is_tuple(call.arguments) and isinstance(call.arguments[0], int))
    if call.constructs:
        # As torch.save writes modules. Their constructors are never called.
        is_module = isinstance(objects[path], type) and issubclass(objects[path], nn.Module)
        return call.arguments == () and (is_module or path in _RECORDS)
    return _is_tuple(call.arguments) and _may_reduce(path, call.arguments, objects)


def _may_reduce(path: str, arguments: tuple[Any, ...], objects: dict[str, Any]) -> bool:
    """Whether ``function(*arguments)`` may be called."""
    if path == _PARTIAL:
        return _is_layer(arguments[0], objects)
    if path in _ENUMS:
        return len(arguments) == 1 and isinstance(arguments[0], str)
    if path == _NUMPY_DTYPE:
        is_number = isinstance(arguments[0], str) and _NUMBER.fullmatch(arguments[0]) is not None
        return is_number and arguments[1:] == (False, True)
    if path in _NUMPY_SCALARS:
        makers = [_path(value.by) if isinstance(value, Made) else "" for value in arguments]
        return makers == [_NUMPY_DTYPE, "_codecs.encode"]
    return False


def _holds_inert(arguments: Any, stood_in: Mapping[str, Refusal]) -> bool:
    if isinstance(arguments, tuple):
        return any(_holds_inert(argument, stood_in) for argument in arguments)
    return inert.is_inert(arguments, stood_in)


def _may_set_state(
    target: Any, state: Any, objects: dict[str, Any], stood_in: Mapping[str, Refusal]
) -> bool:
    if isinstance(target, Name):
        return False
    if inert.is_inert(target, stood_in):
        return True
    path = _path(target.by) if isinstance(target, Made) else ""
    if path == _PARTIAL:
        # The state names the callable anew.
        return _is_tuple(state) and _is_layer(state[0], objects)
    if path == _NUMPY_DTYPE:
        return (
            isinstance(state, tuple)
            and len(state) == 8
            and state[:2] in [(3, order) for order in "<>|="]
            and all(a is b or a == b for a, b in zip(state[2:], _NUMBER_STATE, strict=True))
        )
    return path not in objects or isinstance(objects[path], type)


def _may_be_held(found: Any, allow: Sequence[str]) -> bool:
    """Whether a module may hold ``found`` as a value, which its forward may call."""
    if not isinstance(found, type):
        return found is not functools.partial
    return issubclass(found, nn.Module) and covers((*_PARTIAL_OVER, *allow), found.__module__)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0


def _is_layer(value: Any, objects: dict[str, Any]) -> bool:
    found = objects.get(value.path) if isinstance(value, Name) else None
    return isinstance(found, type) and covers(_PARTIAL_OVER, found.__module__)


def _path(value: Any) -> str:
    if isinstance(value, Made):
        return f"what {_path(value.by)} returns"
    return value.path if isinstance(value, Name) else "an object"


PACKED = "torch.ScriptObject"
"""How a whole int8 model names the weights of its layers, which it does not hold as tensors."""

WRAPPERS = {
    PACKED: "Give the float model or its checkpoint: excite the float model, and quantize it after "
    "training.",
    "torch.nn.parallel.distributed.DistributedDataParallel": "Save the model inside the wrapper: "
    "`torch.save(model.module, ...)`.",
    "torch._dynamo.eval_frame.OptimizedModule": "Save the model inside the wrapper: "
    "`torch.save(model._orig_mod, ...)`.",
    "torch.fx.graph_module.reduce_graph_module": "Save the eager model it was traced from, or "
    "give its state_dict with --arch (`architecture=`).",
    "torch.distributed.tensor.DTensor": "Gather the full state dict before saving it: "
    "`torch.distributed.checkpoint.state_dict.get_model_state_dict` with `full_state_dict=True`.",
}
"""What to save instead of some objects that a pickle cannot bring back safely."""
