"""docs/works-with.md says what the tests show."""

from __future__ import annotations

from tests.works_with import PAGE, page, rows


def test_the_page_holds_the_rows_of_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "write it anew: python -m tests.works_with"


def test_no_two_rows_say_the_same() -> None:
    situations = [(row.area, row.situation, row.note) for row in rows()]
    assert len(set(situations)) == len(situations)
