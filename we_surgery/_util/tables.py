"""Tables for terminals of 80 columns: equal rows are merged, long texts go into a legend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

NARROW = 80
_GAP = 2


def merge_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names that differ only in numbers, by a pattern.

    Example:
        >>> list(merge_names(["layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1", "fc"]))
        ['layer1.{0-2}.conv1', 'fc']
    """
    # Numbers stand at the odd places of what the split gives.
    patterns = {tuple(re.split(r"(\d+)", name)): [name] for name in names}
    longest = max((len(parts) for parts in patterns), default=0)
    for place in range(longest - 2, 0, -2):
        patterns = _merged_at(place, patterns)
    return {"".join(parts): members for parts, members in patterns.items()}


_Patterns = dict[tuple[str, ...], list[str]]


def _merged_at(place: int, patterns: _Patterns) -> _Patterns:
    """The patterns, those as one that differ in the number at one place alone."""
    groups: dict[tuple[tuple[str, ...], ...], list[tuple[str, ...]]] = {}
    for parts in patterns:
        has_number = place < len(parts) and parts[place].isdigit()
        key = (parts[:place], parts[place + 1 :]) if has_number else (parts,)
        groups.setdefault(key, []).append(parts)
    merged = {}
    for alike in groups.values():
        first = alike[0]
        if len(alike) > 1:
            numbers = _braces([parts[place] for parts in alike])
            first = (*first[:place], numbers, *first[place + 1 :])
        merged[first] = [name for parts in alike for name in patterns[parts]]
    return merged


def _braces(numbers: list[str]) -> str:
    """``{0-2,5}`` for the numbers 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(texts)}}}"


def merge_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows that differ in their first cell alone, a name, as one; and how many they were."""
    name = next(iter(rows[0]), "")
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        same = tuple(str(cell) for key, cell in row.items() if key != name)
        alike.setdefault(same, []).append(row)
    for group in alike.values():
        for pattern, names in merge_names(row[name] for row in group).items():
            count = str(len(names)) if len(names) > 1 else ""
            others = {key: cell for key, cell in group[0].items() if key != name}
            yield {name: pattern, "n": count, **others}, len(names)


class Legend:
    """Letters for texts; texts that differ in the names they quote share one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts: dict[str, list[str]] = {}
        for text in texts:
            self._texts.setdefault(_without_names(text), []).append(text)

    def letter(self, text: str) -> str:
        """``a`` for the first text, ``b`` for the second that is not like it, ..."""
        number = list(self._texts).index(_without_names(text))
        letters = ""
        while number >= 0:
            letters = chr(ord("a") + number % 26) + letters
            number = number // 26 - 1
        return letters

    def table(self) -> Table:
        """Each letter and its text."""
        table = Table.grid(padding=(0, _GAP, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for pattern, texts in self._texts.items():
            shown = texts[0] if len(set(texts)) == 1 else pattern
            table.add_row(self.letter(texts[0]), Text(shown))
        return table


def _without_names(text: str) -> str:
    # A rule's pattern is what the user wrote, and is kept.
    return re.sub(r"(?<!rule )'[^']*'", "'...'", text)


def table_of(
    rows: Sequence[Mapping[str, Text | str]],
    *,
    width: int | None = None,
    expendable: Sequence[str] = (),
    right: Sequence[str] = (),
) -> Table:
    """A table whose cells are never wrapped.

    Args:
        rows: cells by column heading.
        width: drops columns in the order of ``expendable`` until the table fits; None keeps all.
        expendable: headings of columns that may be dropped.
        right: headings of columns of numbers.
    """
    headings = [heading for heading in rows[0] if any(str(row[heading]) for row in rows)]
    sizes = {h: max(len(h), *(len(str(row[h])) for row in rows)) for h in headings}
    needed = sum(sizes.values()) + _GAP * (len(sizes) - 1)
    for heading in expendable:
        if width is not None and needed > width and heading in headings:
            headings.remove(heading)
            needed -= sizes[heading] + _GAP
    # A table without a width of its own loses columns where the terminal is too narrow.
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", width=needed
    )
    table.padding = (0, 1, 0, 0)  # and a divider
    for heading in headings:
        table.add_column(
            heading,
            no_wrap=True,
            min_width=sizes[heading],
            justify="right" if heading in right else "left",
        )
    for row in rows:
        table.add_row(*(_text(row[heading]) for heading in headings))
    return table


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)
