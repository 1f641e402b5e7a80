"""The size and the shape of the package: rooms, floors, circles, long files and functions.

    python benchmarks/house.py
    python benchmarks/house.py --json

A *room* is a folder of the package. The *floors* are the modules of the longest chain of imports. A
*circle* is a set of modules each of which imports all others, directly or through others.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "we_surgery"
ROOT = "(root)"
# When an import runs: as its module is imported, for type checkers alone, or in a function.
KINDS = ("run", "typing", "lazy")

Graph = Mapping[str, set[str]]


@dataclass
class Module:
    """One file: its imports of the package by their kind, and its functions' lengths."""

    name: str
    path: str
    room: str
    lines: int
    functions: dict[str, int]
    imports: dict[str, set[str]] = field(default_factory=lambda: {kind: set() for kind in KINDS})


@dataclass(frozen=True)
class House:
    """The figures of one package."""

    lines: int
    files: int
    rooms: dict[str, dict[str, int]]
    arrows: dict[str, list[str]]
    files_in_root: int
    floors_of_rooms: int
    floors: int
    floors_with_all_imports: int
    longest_chain: list[str]
    circles: list[list[str]]
    circles_with_lazy_imports: list[list[str]]
    median_file: float
    longest_file: tuple[str, int]
    longest_function: tuple[str, int]


def read_modules(package: Path) -> dict[str, Module]:
    """All modules of a package, by name; imports of anything else are left out."""
    files = {_module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    modules = {}
    for name, path in files.items():
        text = path.read_text()
        tree = ast.parse(text)
        inside = path.relative_to(package)
        room = inside.parts[0] if len(inside.parts) > 1 else ROOT
        module = Module(name, str(inside), room, len(text.splitlines()), _functions(tree))
        is_package = path.name == "__init__.py"
        for node, kind in _imports(tree):
            module.imports[kind] |= set(_targets(node, name, is_package, files)) - {name}
        modules[name] = module
    return modules


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(tree: ast.Module) -> dict[str, int]:
    found = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f"{n.name}:{n.lineno}": (n.end_lineno or n.lineno) - n.lineno + 1 for n in found}


def _imports(node: ast.AST, kind: str = "run") -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, "typing")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(child, "lazy")
        else:
            yield from _imports(child, kind)


def _targets(node: ast.AST, name: str, is_package: bool, known: Iterable[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            parts = name.split(".")
            parents = parts[: len(parts) - node.level + is_package]
            source = ".".join([*parents, *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            if inner in known:
                yield inner
            elif source in known:
                yield source


def import_graph(modules: Mapping[str, Module], kinds: Iterable[str]) -> Graph:
    """Who imports whom, counting imports of these kinds."""
    return {n: set().union(*(m.imports[kind] for kind in kinds)) for n, m in modules.items()}


def find_circles(graph: Graph) -> list[list[str]]:
    """Sets of more than one module that all reach one another."""
    reached = {name: _reached(graph, name) for name in graph}
    circles = {frozenset(o for o in found if name in reached[o]) for name, found in reached.items()}
    return sorted(sorted(circle) for circle in circles if len(circle) > 1)


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain of imports from top to bottom; the modules of a circle are one floor."""
    circle_of = {name: tuple(circle) for circle in find_circles(graph) for name in circle}
    together = {name: circle_of.get(name, (name,)) for name in graph}
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for name, imported in graph.items():
        below[together[name]] |= {together[other] for other in imported} - {together[name]}
    chains: dict[tuple[str, ...], list[str]] = {}

    def chain(group: tuple[str, ...]) -> list[str]:
        if group not in chains:
            longest = max((chain(other) for other in sorted(below[group])), key=len, default=[])
            chains[group] = [" = ".join(group), *longest]
        return chains[group]

    return max((chain(group) for group in sorted(set(together.values()))), key=len, default=[])


def measure(package: Path) -> House:
    """All figures of a package."""
    modules = read_modules(package)
    rooms: dict[str, dict[str, int]] = {}
    for module in modules.values():
        room = rooms.setdefault(module.room, {"files": 0, "lines": 0})
        room["files"] += 1
        room["lines"] += module.lines
    at_import = longest_chain(import_graph(modules, ["run"]))
    functions = {
        f"{module.path} {name.partition(':')[0]}": length
        for module in modules.values()
        for name, length in module.functions.items()
    }
    sizes = {module.path: module.lines for module in modules.values()}
    return House(
        lines=sum(sizes.values()),
        files=len(sizes),
        rooms=rooms,
        arrows=_arrows(modules),
        files_in_root=rooms.get(ROOT, {}).get("files", 0),
        floors_of_rooms=len(longest_chain(_room_graph(modules))),
        floors=len(at_import),
        floors_with_all_imports=len(longest_chain(import_graph(modules, KINDS))),
        longest_chain=at_import,
        circles=find_circles(import_graph(modules, ["run", "typing"])),
        circles_with_lazy_imports=find_circles(import_graph(modules, KINDS)),
        median_file=statistics.median(sizes.values()),
        longest_file=max(sizes.items(), key=lambda item: item[1]),
        longest_function=max(functions.items(), key=lambda item: item[1], default=("", 0)),
    )


def _arrows(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """The rooms that each room imports, at any time and for whatever reason."""
    arrows: dict[str, set[str]] = {module.room: set() for module in modules.values()}
    for module in modules.values():
        for imported in set().union(*module.imports.values()):
            arrows[module.room].add(modules[imported].room)
    return {room: sorted(others - {room}) for room, others in arrows.items()}


def _room_graph(modules: Mapping[str, Module]) -> Graph:
    """Imports of any kind between folders; a file in the root is a room of its own."""
    places = {name: m.name if m.room == ROOT else m.room for name, m in modules.items()}
    graph: dict[str, set[str]] = {place: set() for place in places.values()}
    for name, module in modules.items():
        imported = {places[other] for other in set().union(*module.imports.values())}
        graph[places[name]] |= imported - {places[name]}
    return graph


def describe(house: House) -> str:
    """The figures as text."""
    rows = [f"{'room':<14}{'files':>7}{'lines':>8}  imports"]
    for name, room in sorted(house.rooms.items()):
        imported = ", ".join(house.arrows[name])
        rows.append(f"{name:<14}{room['files']:>7}{room['lines']:>8,}  {imported}")
    rows += [
        f"{'in all':<14}{house.files:>7}{house.lines:>8,}",
        "",
        f"files in the root  {house.files_in_root}",
        f"floors of rooms    {house.floors_of_rooms}",
        f"floors of files    {house.floors}, with TYPE_CHECKING and lazy imports "
        f"{house.floors_with_all_imports}",
        *(f"  {name}" for name in house.longest_chain),
        f"circles            {len(house.circles)}, TYPE_CHECKING included",
        *(f"  {', '.join(circle)}" for circle in house.circles),
        f"circles with lazy  {len(house.circles_with_lazy_imports)}",
        *(f"  {', '.join(circle)}" for circle in house.circles_with_lazy_imports),
        f"median file        {house.median_file:g} lines",
        f"longest file       {house.longest_file[0]}, {house.longest_file[1]} lines",
        f"longest function   {house.longest_function[0]}, {house.longest_function[1]} lines",
    ]
    return "\n".join(rows)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    house = measure(arguments.package.resolve())
    text = json.dumps(asdict(house), indent=2) if arguments.json else describe(house)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
