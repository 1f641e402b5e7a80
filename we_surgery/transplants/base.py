"""The base class of transplants: where they go, how they are inserted and removed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn


@dataclass(frozen=True)
class Site:
    """A place in a model that a transplant is meant for.

    Attributes:
        place: the module's name ("" for the model itself); for a node of a ``torch.fx`` graph,
            the graph module's name, ``@`` and the node's name.
        type_name: the module's qualified class, or the function that the node calls.
        reason: why the transplant goes there or not.
        fits: whether it can go there.
    """

    place: str
    type_name: str
    reason: str
    fits: bool = True


@dataclass(frozen=True)
class Transplant(ABC):
    """A method that changes the layers of a model, with its options as fields.

    Subclasses are frozen dataclasses. They set the class attributes and define :meth:`sites` and
    :meth:`attach`; also :meth:`attached` and :meth:`detach` if strip removes something.

    Attributes:
        match: a pattern, as of a rule, for the places it may go to.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What it does, in a line."""
    source: ClassVar[str]
    """The paper, and the code it was compared with."""
    published: ClassVar[tuple[str, ...]]
    """The results its authors print, also where it did not help."""
    deploys_to: ClassVar[str]
    """What is left of it after strip."""
    forms: ClassVar[str] = "convert puts it in; excitation in both"

    match: str = "*"

    @property
    def stays(self) -> bool:
        """Whether it is part of the deployed model."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method itself, without ``match``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "match"}

    @abstractmethod
    def sites(self, model: nn.Module) -> Sequence[Site]:
        """The places for it in ``model``, in the model's order."""

    @abstractmethod
    def attach(self, model: nn.Module, place: str) -> None:
        """Puts it into one place of ``model``.

        New modules get their neighbours' device and dtype.

        Raises:
            InputError: it cannot go there.
        """

    def reattach(self, model: nn.Module, place: str) -> None:
        """:meth:`attach` to a model whose weights are yet to be loaded."""
        self.attach(model, place)

    @classmethod
    def attached(cls, model: nn.Module) -> Iterator[str]:
        """The places where strip removes it; none if it stays."""
        return iter(())

    @classmethod  # noqa: B027
    def detach(cls, model: nn.Module, place: str) -> None:
        """Removes it from one of these places; undoes :meth:`attach`."""


def qualified_name(thing: Any) -> str:
    """``torch.nn.modules.dropout.Dropout`` for a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def replace_module(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Puts ``replacement`` where ``name`` is, wherever that module is registered."""
    old = model.get_submodule(name)
    slots = [
        (parent, child_name)
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if child is old
    ]

    for parent, child_name in slots:
        parent._modules[child_name] = replacement
