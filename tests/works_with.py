"""The table of docs/works-with.md: each row is what a test shows.

    python -m tests.works_with

writes it anew. Rows are read from the tests' source, so that a row cannot outlive its test.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ditfastattn.core.files import write_text_atomically

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "works-with.md"
OUTCOMES = ("works", "works, slower", "runs dense, with a warning", "refused")

_BEGIN, _END = "<!-- rows -->\n", "<!-- end of rows -->\n"
_Test = TypeVar("_Test", bound=Callable[..., None])


def works_with(area: str, situation: str, outcome: str, note: str = "") -> Callable[[_Test], _Test]:
    """Name the row of the page that a test shows.

    Args:
        area: the heading under which it stands.
        situation: what a user does, in Markdown.
        outcome: one of ``OUTCOMES``.
        note: how exact, why slower, or what is said.
    """
    assert outcome in OUTCOMES, (area, situation, note)
    return lambda test: test


@dataclass(frozen=True, order=True)
class Row:
    """One row, and the test that shows it."""

    area: str
    situation: str
    outcome: str
    note: str
    file: str
    test: str


def rows() -> list[Row]:
    """Return the rows of all tests."""
    return sorted(row for path in TESTS.rglob("test_*.py") for row in _rows_of(path))


def _rows_of(path: Path) -> Iterator[Row]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == works_with.__name__:
                named = [ast.literal_eval(item) for item in call.args]
                area, situation, outcome, note = (*named, "")[:4]
                file = path.relative_to(TESTS.parent).as_posix()
                yield Row(area, situation, outcome, note, file, node.name)  # type: ignore[attr-defined]  # it has decorators


def page(old: str) -> str:
    """Return the page ``old`` with the rows of today."""
    head, rest = old.split(_BEGIN)
    lines: list[str] = []
    area = ""
    for row in rows():
        if row.area != area:
            area = row.area
            lines += ["", f"## {area}", "", "| what you do | what happens | | shown by |"]
            lines += ["|---|---|---|---|"]
        link = f"[{row.test.removeprefix('test_').replace('_', ' ')}](../{row.file})"
        lines.append(f"| {row.situation} | {row.outcome} | {row.note} | {link} |")
    return head + _BEGIN + "\n".join([*lines, "", ""]) + _END + rest.split(_END)[1]


def main() -> None:
    """Write the page."""
    write_text_atomically(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
