"""What a pickle would do: its names and calls, found without running it."""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

# The instructions that torch's own safe unpickler knows; all that torch.save writes.
_CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A class or function in a pickle, by Python 3's name of its module.

    ``written`` is the path in the pickle; protocol 2 has Python 2's names.
    """

    module: str
    name: str
    written: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """``module.name``, as torch's list of safe names has it."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Made:
    """The result of a call in the pickle."""

    by: Any


class Opaque:
    """A list, dict, set or storage; pickles cannot take anything out of it again."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call that the pickle would make, of ``function.__new__`` if it ``constructs``.

    The function is a :class:`Name` or the result of an earlier call. Arguments written as a tuple
    are a tuple of constants and values of this module.
    """

    function: Any
    arguments: Any
    constructs: bool


@dataclass
class Actions:
    """All actions of one or several pickles, in order; names by their paths.

    Names that are ``held`` end up as a value in an object. ``states`` are pairs of an object and
    its new state, ``filled`` results of calls that get items, ``extended`` those that are appended
    to.
    """

    names: dict[str, Name] = field(default_factory=dict)
    held: dict[str, Name] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    states: list[tuple[Any, Any]] = field(default_factory=list)
    filled: list[Made] = field(default_factory=list)
    extended: list[Made] = field(default_factory=list)


def scan(stream: IO[bytes], actions: Actions) -> None:
    """Follows one pickle to its end without running it, and records its actions.

    It keeps the unpickler's stack and memo with stand-ins for objects, so each call is seen with
    its function and arguments. A damaged pickle, or an instruction that torch.save never writes, is
    a ValueError.
    """
    try:
        _follow(stream, actions)
    except (IndexError, KeyError) as error:
        raise ValueError("its instructions do not fit together") from error


def _follow(stream: IO[bytes], actions: Actions) -> None:
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}

    def take(count: int) -> Sequence[Any]:
        if len(stack) < count:
            raise IndexError(count)
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def take_to_mark() -> Sequence[Any]:
        nonlocal stack
        taken, stack = stack, marked.pop()
        return hold(taken)

    def hold(values: Sequence[Any]) -> Sequence[Any]:
        actions.held.update({value.path: value for value in values if isinstance(value, Name)})
        return values

    def note_target(made: list[Made]) -> None:
        if isinstance(stack[-1], Made):
            made.append(stack[-1])

    for instruction, argument, _ in pickletools.genops(stream):
        match instruction.name:
            case "PROTO":
                if argument != 2:
                    raise ValueError(f"it is of pickle protocol {argument}, and torch.save's is 2")
            case "GLOBAL":
                name = _name(str(argument))
                actions.names.setdefault(name.path, name)
                stack.append(name)
            case "NEWOBJ" | "REDUCE" as kind:
                function, arguments = take(2)
                hold([arguments])
                actions.calls.append(Call(function, arguments, constructs=kind == "NEWOBJ"))
                stack.append(Made(function))
            case "BUILD":
                (state,) = hold(take(1))
                actions.states.append((stack[-1], state))
            case "MARK":
                marked.append(stack)
                stack = []
            case "TUPLE":
                items = tuple(take_to_mark())
                stack.append(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as size:
                stack.append(tuple(hold(take(_TUPLES[size]))))
            case "APPEND":
                hold(take(1))
                note_target(actions.extended)
            case "APPENDS":
                take_to_mark()
                note_target(actions.extended)
            case "SETITEM":
                hold(take(2))
                note_target(actions.filled)
            case "SETITEMS":
                take_to_mark()
                note_target(actions.filled)
            case "BINPERSID":
                (key,) = take(1)
                if isinstance(key, tuple) and key[:1] == ("module",):
                    raise ValueError("it holds a whole model in the format of torch before 1.6")
                stack.append(Opaque())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "STOP":
                take(1)
            case kind if kind in _CONTAINERS:
                stack.append(Opaque())
            case kind if kind in _CONSTANTS:
                stack.append(_constant(kind, argument))
            case kind:
                raise ValueError(f"it has an instruction {kind}, which torch.save never writes")


def _constant(kind: str, argument: Any) -> Any:
    return {"NEWTRUE": True, "NEWFALSE": False}.get(kind, argument)


def _name(text: str) -> Name:
    module, _, name = text.partition(" ")
    written = f"{module}.{name}"
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return Name(IMPORT_MAPPING.get(module, module), name, written)
