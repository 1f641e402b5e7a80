"""A state dict's keys by what they begin with, found without a look at all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class KeyIndex:
    """Finds keys by their beginnings."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._place = {key: place for place, key in enumerate(keys)}
        self._sorted = sorted(self._place)

    def beginning_with(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix``, in their own order."""
        first = last = bisect_left(self._sorted, prefix)
        while last < len(self._sorted) and self._sorted[last].startswith(prefix):
            last += 1
        return sorted(self._sorted[first:last], key=self._place.__getitem__)
