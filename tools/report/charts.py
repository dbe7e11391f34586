"""Draw a report's charts as SVG whose text takes the page's colours, dark or light."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.tools.report.content import PlanSection, Points
from ditfastattn.tools.savings import Shortcut

_INK = "#010203"  # stands for the page's colour of text
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")
_SHORTCUTS = dict(
    zip(Shortcut, ("#0072b2", "#e69f00", "#56b4e9", "#8fbf6a", "#d55e00", "#cc79a7"), strict=True)
)
_MOST_SLOTS = 80
_charts = itertools.count()


def frontier(points: Points, quality: str) -> str:
    """Draw quality against speedup, a line per series."""
    figure, axis = _figure(3.4)
    for colour, (name, series) in zip(itertools.cycle(_COLOURS), points.items(), strict=False):
        ordered = sorted(series)
        axis.plot([p[0] for p in ordered], [p[1] for p in ordered], "o-", color=colour, label=name)
        for x, y, label in ordered:
            axis.annotate(
                label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, color=_INK
            )
    axis.set_xlabel("speedup over dense")
    axis.set_ylabel(quality)
    axis.margins(x=0.15, y=0.15)
    _legend(axis, len(points))
    return _svg(figure)


def savings_bars(sections: Sequence[PlanSection]) -> str:
    """Draw, per plan, what is left of a dense generation and what each shortcut saves of it."""
    priced = [section for section in sections if section.saved]
    figure, axis = _figure(0.7 + 0.6 * len(priced))
    labels: list[str] = []
    for section in priced:
        for unit, which in (("FLOPs", 0), ("time", 1)):
            shares = {pair[which].shortcut: max(0.0, pair[which].share) for pair in section.saved}
            left = max(0.0, 1.0 - sum(shares.values()))
            place = len(labels)
            axis.barh(place, left, color="#8895a0", label="computed" if not labels else None)
            for kind, share in shares.items():
                shown = kind.value if not labels else None
                axis.barh(place, share, left=left, color=_SHORTCUTS[kind], label=shown)
                left += share
            labels.append(f"{section.name}: {unit}")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("share of a dense generation")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_INK, fontsize=8)
    return _svg(figure)


def held(sections: Sequence[PlanSection]) -> str:
    """Draw the MiB of caches that each plan holds after each step."""
    figure, axis = _figure(2.6)
    shown = [section for section in sections if section.caches]
    for colour, section in zip(itertools.cycle(_COLOURS), shown, strict=False):
        held = [count / 2**20 for count in section.held_bytes]
        axis.step(range(len(held)), held, where="post", color=colour, label=section.name)
    axis.set_xlabel("step")
    axis.set_ylabel("MiB held")
    axis.set_ylim(bottom=0.0)
    _legend(axis, len(shown))
    return _svg(figure)


def lifetimes(slots: Sequence[CacheSlot]) -> str:
    """Draw a line per cache slot from each step that writes it to the last one that reads it."""
    shown = slots[:_MOST_SLOTS]
    figure, axis = _figure(0.8 + 0.13 * len(shown))
    for place, each in enumerate(shown):
        for written, read in each.lives:
            axis.plot([written, read], [place, place], color=_COLOURS[0], linewidth=3)
    axis.set_yticks(range(len(shown)), [str(each.slot) for each in shown], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("step" if len(shown) == len(slots) else f"step; {len(slots)} slots in all")
    return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.6, height), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("none")
    figure.patch.set_alpha(0.0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=8)
    return figure, axis


def _legend(axis: Axes, series: int) -> None:
    if series > 1:
        axis.legend(frameon=False, labelcolor=_INK, fontsize=8)


def _svg(figure: Figure) -> str:
    """Return the figure as an ``svg`` element with names of its own."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_color(_INK)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    prefix = f"c{next(_charts)}-"
    drawn = re.sub(r'\bid="', f'id="{prefix}', drawn)
    drawn = re.sub(r'href="#', f'href="#{prefix}', drawn).replace("url(#", f"url(#{prefix}")
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', drawn, count=1)
    return drawn.replace(_INK, "currentColor")
