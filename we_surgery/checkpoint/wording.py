"""Lists in messages."""

from __future__ import annotations

from collections.abc import Iterable


def listed(texts: Iterable[str], limit: int = 8) -> str:
    """The texts with commas, the number of those left off, and "none" for none."""
    texts = list(texts)
    more = [f"{len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join([*texts[:limit], *more]) or "none"


def quoted(names: Iterable[object], limit: int = 8) -> str:
    """:func:`listed`, each name in quotes."""
    return listed((repr(str(name)) for name in names), limit)
