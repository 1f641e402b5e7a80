"""Tables that break no cell, and merge what is alike."""

from __future__ import annotations

import io

import pytest

from we_surgery._util.tables import Legend, merge_names, table_of
from we_surgery._util.text import SafeConsole


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.0.x", "a.1.x", "a.2.x", "a.5.x"], ["a.{0-2,5}.x"]),
        (["a.0.c1", "a.0.c2", "a.1.c1", "a.1.c2"], ["a.{0,1}.c{1,2}"]),
        # No pattern may say more than there is.
        (["a.0.c1", "a.0.c2", "a.1.c1"], ["a.0.c{1,2}", "a.1.c1"]),
        (["fc", "fc2", "0", "1"], ["fc", "fc2", "{0,1}"]),
        ([], []),
    ],
)
def test_names_that_differ_in_numbers_share_a_pattern(names: list[str], merged: list[str]) -> None:
    found = merge_names(names)
    assert list(found) == merged
    assert sorted(name for members in found.values() for name in members) == sorted(names)


def test_a_legend_has_one_letter_for_reasons_that_quote_different_names() -> None:
    texts = ["'bn1' follows", "depthwise", "'bn2' follows", "rule 'a*'", "rule 'b*'"]
    legend = Legend(texts)
    assert [legend.letter(text) for text in texts] == ["a", "b", "a", "c", "d"]
    shown = printed(legend.table(), 80)
    assert "'...' follows" in shown
    assert "rule 'b*'" in shown


def test_letters_go_on_after_the_last() -> None:
    texts = [f"reason {chr(ord('a') + n % 26)}{n}" for n in range(60)]
    letters = [Legend(texts).letter(text) for text in texts]
    assert letters[25:28] == ["z", "aa", "ab"]
    assert len(set(letters)) == 60


ROWS = [
    {"name": "short", "n": "1", "note": "x"},
    {"name": "a.very.long.name.of.a.layer", "n": "1000", "note": "a note"},
]


def printed(table: object, width: int) -> str:
    buffer = io.StringIO()
    SafeConsole(file=buffer, width=width).print(table, crop=False)
    return buffer.getvalue()


def test_columns_go_and_cells_stay_whole() -> None:
    shown = printed(table_of(ROWS, width=36, expendable=["n", "note"]), 36)
    assert "a.very.long.name.of.a.layer  a note" in shown
    assert "1000" not in shown
    narrow = printed(table_of(ROWS, width=10, expendable=["n", "note"]), 10)
    assert "a.very.long.name.of.a.layer" in narrow
    assert "note" not in narrow
    assert "1000  a note" in printed(table_of(ROWS), 20)


def test_a_column_without_cells_is_left_out() -> None:
    assert "n" not in printed(table_of([{"x": "1", "n": ""}]), 80)
