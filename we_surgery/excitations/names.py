"""What an excited layer calls its parts, and how a parameter is renamed in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from torch import nn

RAW_PREFIX = "raw_"
EXCITATION = "excitation"


def raw_name(parameter: str) -> str:
    """Where the raw tensor of ``parameter`` is kept: ``weight`` -> ``raw_weight``."""
    return RAW_PREFIX + parameter


def vanilla_key(raw_key: str) -> str:
    """A state dict's key of the weight whose raw tensor has this one."""
    owner, dot, last = raw_key.rpartition(".")
    return f"{owner}{dot}{last.removeprefix(RAW_PREFIX)}"


def excitation_name(parameter: str) -> str:
    """The submodule that excites ``parameter``: ``in_proj_weight`` -> ``in_proj_excitation``."""
    stem = parameter.removesuffix("weight")
    return stem + EXCITATION if stem != parameter else f"{parameter}_{EXCITATION}"


def names_taken(parameter: str) -> tuple[str, ...]:
    """The attributes that exciting ``parameter`` adds to a layer."""
    return raw_name(parameter), excitation_name(parameter), "layer_name"


_SEPARATOR = ":"


@dataclass(frozen=True)
class MadeClass:
    """The class of an excited layer that is made on demand, as pickles name it.

    The separators are no characters of an identifier, and a dot would send pickle looking for
    attributes of attributes. Parameters may have any name, as in a ParameterDict.

    Attributes:
        module: the vanilla class's module.
        classes: its qualified name: those it is nested in, and its own.
        parameters: those that are excited.
    """

    module: str
    classes: tuple[str, ...]
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, base: type, parameters: Sequence[str]) -> MadeClass:
        """The class of a ``base`` layer whose ``parameters`` are excited."""
        return cls(base.__module__, tuple(base.__qualname__.split(".")), tuple(parameters))

    @classmethod
    def parse(cls, name: str) -> MadeClass | None:
        """The inverse of :attr:`name`; None where it is the name of something else."""
        module, *rest = name.split(_SEPARATOR)
        if len(rest) < 2:
            return None
        classes, *parameters = rest
        found = cls(
            module.replace("/", "."), tuple(classes.split("/")), tuple(map(unquote, parameters))
        )
        # One name for one class: pickles are looked over by it.
        return found if found.name == name else None

    @property
    def name(self) -> str:
        """What pickle calls it."""
        quoted = (quote(parameter, safe="") for parameter in self.parameters)
        return _SEPARATOR.join((self.module.replace(".", "/"), "/".join(self.classes), *quoted))


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Renames a parameter without a change of its position."""
    renamed = {new if name == old else name: p for name, p in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(renamed)
