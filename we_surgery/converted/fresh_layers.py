"""What an excited layer's own methods make of its class: vanilla layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def vanilla_initializer(base: Any) -> Callable[..., None]:
    """The ``__init__`` of an excited class of ``base``, which makes a ``base``.

    Only a layer's own methods call it, as ``self.__class__(...)``; layers become excited by a swap
    of their class, and copies and pickles initialize nothing.
    """

    @functools.wraps(base.__init__)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = base
        self.__init__(*args, **kwargs)

    return initialize


def item_or_slice(base: Any) -> Callable[[Any, Any], Any]:
    """The ``__getitem__`` of an excited ``ParameterList``."""

    def get(self: Any, index: Any) -> Any:
        if not isinstance(index, slice):
            return base.__getitem__(self, index)
        found = base()
        for value in (self[i] for i in range(*index.indices(len(self)))):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                # Excited. Appended, it would become a Parameter, which passes no gradient on.
                found.__dict__[str(len(found))] = value
                found._size += 1
            else:
                found.append(value)
        return found

    return get
