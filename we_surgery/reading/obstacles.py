"""Why a parameter cannot be excited, from the parameter and its layer's source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from we_surgery._util.scripted import is_scripted, own_parameters
from we_surgery.excitations import Composition
from we_surgery.excitations.names import RAW_PREFIX, excitation_name, names_taken
from we_surgery.reading.kinds import kind_of

_EXCITABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NOT_A_MODELS = ("torch", "builtins")
_LIBRARIES = ("", "torch", "nn", "init", "F")
_VIEWS = (
    *("view", "reshape", "flatten", "t", "transpose", "permute"),
    *("squeeze", "unsqueeze", "detach", "numpy"),
)


def excited_names(module: nn.Module) -> tuple[str, ...]:
    """The excited parameters of ``module``, by their vanilla names."""
    raw = (name for name in own_parameters(module) if name.startswith(RAW_PREFIX))
    return tuple(
        name
        for name in (name.removeprefix(RAW_PREFIX) for name in raw)
        if isinstance(module._modules.get(excitation_name(name)), Composition)
    )


def obstacle_of(module: nn.Module, parameter: str) -> str | None:
    """Why the parameter cannot be excited, whatever the policy says."""
    if parameter in excited_names(module):
        return "is excited already"
    if parametrize.is_parametrized(module):
        return "carries a torch.nn.utils.parametrize parametrization"
    if is_scripted(module):
        is_conv = (kind_of(module) or "").startswith("conv")
        if is_conv and not hasattr(module, "groups"):
            return "is a conv in traced TorchScript, which does not say how many groups it has"
        return None
    if f"{parameter}_g" in module._parameters:
        return "carries a torch.nn.utils.weight_norm hook"
    if f"{parameter}_orig" in module._parameters:
        return "carries a spectral_norm hook or a pruning mask"
    weight = module._parameters.get(parameter)
    if weight is None:
        return f"is computed by its module, which has no parameter {parameter!r}"
    if isinstance(weight, UninitializedParameter):
        return "is lazy and has no shape before its first forward pass"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "belongs to a recurrent layer, which passes its weights to a fused kernel"
    if weight.layout != torch.strided:
        return "has a sparse weight"
    if weight.dtype not in _EXCITABLE_DTYPES:
        return f"has a weight of dtype {weight.dtype}"
    kind: Any = type(module)
    if parameter in written_in_forward(kind):
        return "is written to in its layer's own forward pass"
    if hasattr(weight, "full_tensor"):
        return "is sharded (a DTensor); convert before fully_shard"
    return None


def converted_obstacle_of(module: nn.Module, parameter: str) -> str | None:
    """Why no excitation of the parameter can stand in the module."""
    if is_scripted(module):
        return "is TorchScript, which cannot be changed"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return "belongs to a container, which would run an excitation as one of its layers"
    if isinstance(module, nn.ParameterList):
        return "belongs to a ParameterList, whose slices would not be excited"
    if parameter in excited_names(module):
        return None
    taken = [name for name in names_taken(parameter) if hasattr(module, name)]
    return f"has an attribute {taken[0]!r} of its own" if taken else None


@lru_cache(maxsize=1024)
def written_in_forward(kind: Any) -> frozenset[str]:
    """What the source of a class's forward writes to, such as ``weight`` or ``conv.weight``.

    It knows ``self.weight.data *= mask``, ``self.conv.weight.data = ...``,
    ``self.weight.clamp_(...)``, ``init.zeros_(self.weight)`` and
    ``torch.mul(..., out=self.weight.data)``, also through a local name of the weight or a view.
    """
    own = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in _NOT_A_MODELS]
    trees = [_source(vars(base).get("forward")) for base in own]
    return frozenset(
        path for tree in trees for target in _written(tree) for path in _paths(target, _names(tree))
    )


def _source(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # there is none, or it was taken out of a line
        return ast.Module([], [])


def _written(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions that statements assign to, and those given to what changes them in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from (target for target in node.targets if not isinstance(target, ast.Name))
        elif isinstance(node, ast.AugAssign):
            yield node.target
        elif isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "out")
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if not name.endswith("_") or name.endswith("__"):
                continue
            if owner.split(".")[0] in _LIBRARIES:
                yield from node.args[:1]
            elif isinstance(node.func, ast.Attribute):
                yield node.func.value


def _names(tree: ast.AST) -> dict[str, set[str]]:
    """The variables that are only ever one path's, its ``data`` or a view of it, with the paths."""
    values: dict[str, list[set[str]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(set(_paths(node.value, {})))
    return {name: set.intersection(*given) for name, given in values.items()}


def _paths(expression: ast.expr, names: dict[str, set[str]]) -> Iterator[str]:
    """``conv.weight`` of ``self.conv.weight``, its ``data``, a part or view of it, or a name."""
    while True:
        if isinstance(expression, ast.Name):
            yield from names.get(expression.id, ())
            return
        if path := _dotted(expression):
            yield path.partition(".")[2]
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Attribute):
            if expression.func.attr not in _VIEWS:
                return
            expression = expression.func.value
        elif isinstance(expression, ast.Subscript) or (
            isinstance(expression, ast.Attribute) and expression.attr in ("data", "T", "mT")
        ):
            expression = expression.value
        else:
            return


def _dotted(expression: ast.expr) -> str | None:
    """``self.layers.0.weight`` of ``self.layers[0].weight``."""
    if isinstance(expression, ast.Name):
        return expression.id
    if isinstance(expression, ast.Attribute):
        owner, last = _dotted(expression.value), expression.attr
    elif isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
        owner, last = _dotted(expression.value), str(expression.slice.value)
    else:
        return None
    return None if owner is None else f"{owner}.{last}"
