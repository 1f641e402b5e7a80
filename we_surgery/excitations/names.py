"""The names of an excited layer's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from torch import nn

RAW_PREFIX = "raw_"
EXCITATION = "excitation"


def raw_name(parameter: str) -> str:
    """``weight`` -> ``raw_weight``."""
    return RAW_PREFIX + parameter


def vanilla_key(raw_key: str) -> str:
    """``conv.raw_weight`` -> ``conv.weight``."""
    owner, dot, last = raw_key.rpartition(".")
    return f"{owner}{dot}{last.removeprefix(RAW_PREFIX)}"


def excitation_name(parameter: str) -> str:
    """``in_proj_weight`` -> ``in_proj_excitation``, the submodule that excites it."""
    stem = parameter.removesuffix("weight")
    return stem + EXCITATION if stem != parameter else f"{parameter}_{EXCITATION}"


def names_taken(parameter: str) -> tuple[str, ...]:
    """The attributes that exciting ``parameter`` adds to a layer."""
    return raw_name(parameter), excitation_name(parameter), "layer_name"


_SEPARATOR = ":"


@dataclass(frozen=True)
class MadeClass:
    """A class of excited layers that is made on demand, as pickles name it.

    The separators do not occur in identifiers, and are not dots, which pickle would resolve as
    attributes. Parameters may have any name, as in a ParameterDict.
    """

    module: str
    classes: tuple[str, ...]
    """The vanilla class's qualified name, split at its dots."""
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, base: type, parameters: Sequence[str]) -> MadeClass:
        """That of a layer of class ``base`` whose ``parameters`` are excited."""
        return cls(base.__module__, tuple(base.__qualname__.split(".")), tuple(parameters))

    @classmethod
    def parse(cls, name: str) -> MadeClass | None:
        """The inverse of :attr:`name`; None for other names."""
        module, *rest = name.split(_SEPARATOR)
        if len(rest) < 2:
            return None
        classes, *parameters = rest
        found = cls(
            module.replace("/", "."), tuple(classes.split("/")), tuple(map(unquote, parameters))
        )
        # A class has one name: pickles are checked by it.
        return found if found.name == name else None

    @property
    def name(self) -> str:
        """Its name in pickles."""
        quoted = (quote(parameter, safe="") for parameter in self.parameters)
        return _SEPARATOR.join((self.module.replace(".", "/"), "/".join(self.classes), *quoted))


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Renames a parameter in its place in the order."""
    renamed = {new if name == old else name: p for name, p in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(renamed)
