"""What the source of a layer's forward shows without running it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1024)
def writes_in_forward(kind: Any, parameter: str) -> bool:
    """Whether the forward of a layer class writes to one of its own parameters.

    As ``self.weight.data *= mask``, ``self.weight.data = ...`` or ``self.weight.clamp_(...)`` do.

    Args:
        kind: the class.
        parameter: the parameter's name.
    """
    forwards = (vars(base).get("forward") for base in kind.__mro__ if not _is_torchs(base))
    return any(_writes(tree, parameter) for forward in forwards for tree in _source(forward))


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _source(function: Any) -> Iterator[ast.AST]:
    try:
        yield ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # there is none, or it was taken out of a line
        return


def _writes(tree: ast.AST, parameter: str) -> bool:
    return any(_is_own(target, parameter) for target in _written(tree))


def _written(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions that statements assign to, and those that in-place methods are called on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from node.targets
        elif isinstance(node, ast.AugAssign):
            yield node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name.endswith("_") and not name.endswith("__"):
                yield node.func.value


def _is_own(expression: ast.expr, parameter: str) -> bool:
    """Whether it is ``self.weight``, its ``data`` or a part of them."""
    while isinstance(expression, ast.Subscript) or (
        isinstance(expression, ast.Attribute) and expression.attr == "data"
    ):
        expression = expression.value
    return (
        isinstance(expression, ast.Attribute)
        and expression.attr == parameter
        and isinstance(expression.value, ast.Name)
    )
