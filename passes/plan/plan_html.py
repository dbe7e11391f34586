"""A plan as HTML for notebooks: a row per site, a coloured cell per step."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ditfastattn.passes.plan.strategies import Strategy, every_strategy

_CELL = "width:1.1em;min-width:1.1em;padding:0;text-align:center;font-family:monospace"


def plan_map_html(names: Sequence[str], rows: Sequence[Sequence[Strategy]]) -> str:
    """Return the map of ``rows[step][site]``, whose sites are ``names``, and its legend."""
    lines: list[str] = []
    for index, name in enumerate(names):
        column = [row[index] for row in rows]
        cells = "".join(_cell(strategy, f"step {step}") for step, strategy in enumerate(column))
        lines.append(f'<tr><td style="text-align:left">{escape(name)}</td>{cells}</tr>')
    used = {strategy for row in rows for strategy in row}
    legend = "".join(
        f'<span style="background:{each.colour};color:{ink(each)};font-family:monospace">'
        f"&nbsp;{escape(each.symbol)}&nbsp;</span> {escape(each.label)} &ensp; "
        for each in every_strategy()
        if each in used
    )
    return f"<table>{''.join(lines)}</table><div>{legend}</div>"


def _cell(strategy: Strategy, where: str) -> str:
    style = f"{_CELL};background:{strategy.colour};color:{ink(strategy)}"
    hover = escape(f"{where}: {strategy.label}", quote=True)
    return f'<td title="{hover}" style="{style}">{escape(strategy.symbol)}</td>'


def ink(strategy: Strategy) -> str:
    """Return black or white, whichever can be read on the strategy's colour."""
    red, green, blue = (int(strategy.colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"
