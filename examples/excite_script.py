"""Puts excitation into a training script, in a copy or as a patch.

For scripts that make their optimizer in one function, under the names ``model`` and ``optimizer``:
timm's ``train.py``, torchvision's references for classification, detection and segmentation, and
many others. Two lines are added: an import, and ``attach`` right after the optimizer is made, so
that averages, schedules and resumed checkpoints come after it.

Usage::

    python examples/excite_script.py train.py > train_we.py
    python examples/excite_script.py train.py --mode lwe+mwe --patch > excite.patch
"""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from pathlib import Path


def excited(source: str, mode: str) -> str:
    """The script with the two lines."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    last = made_last(tree)
    call = f'we_surgery.attach(model, optimizer, "{mode}")\n'
    assert last.end_lineno is not None
    lines.insert(last.end_lineno, " " * last.col_offset + call)
    # Not before a `from __future__`, which must stay the first.
    assert first.end_lineno is not None
    lines.insert(first.end_lineno, "import we_surgery\n")
    return "".join(lines)


def made_last(tree: ast.Module) -> ast.stmt:
    """The last statement of a function's own block that makes ``optimizer``, in a branch or not."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        making = [statement for statement in function.body if makes_optimizer(statement)]
        if making:
            return making[-1]
    raise SystemExit("no function of this script makes an `optimizer`")


def makes_optimizer(statement: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and "optimizer" in map(ast.unparse, node.targets)
        for node in ast.walk(statement)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Put excitation into a training script.")
    parser.add_argument("script", type=Path)
    parser.add_argument("--mode", default="lwe")
    parser.add_argument("--patch", action="store_true", help="print a patch, not the script")
    arguments = parser.parse_args()
    before = arguments.script.read_text(encoding="utf-8")
    after = excited(before, arguments.mode)
    if arguments.patch:
        name = arguments.script.name
        sides = before.splitlines(keepends=True), after.splitlines(keepends=True)
        after = "".join(difflib.unified_diff(*sides, f"a/{name}", f"b/{name}"))
    sys.stdout.write(after)


if __name__ == "__main__":
    main()
