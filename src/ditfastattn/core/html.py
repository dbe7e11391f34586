"""Small pieces of HTML for notebooks, where results show themselves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def facts_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of labels and texts."""
    cells = (
        f'<tr><th style="text-align:left">{escape(label)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for label, text in rows
    )
    return f"<table>{''.join(cells)}</table>"
