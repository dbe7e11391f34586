"""Write a report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.plan_html import ink
from ditfastattn.passes.plan.strategies import Strategy, every_strategy
from ditfastattn.tools.report import charts
from ditfastattn.tools.report.content import PlanSection, Report, cells

_ASSETS = Path(__file__).parents[1] / "assets"
_TEMPLATE = "report.html"


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` to the file ``path``."""
    write_text_atomically(path, render(report))


def render(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        ink=ink,
        charts=_charts(report),
        sections=[_section(section) for section in report.sections],
    )


def _charts(report: Report) -> list[tuple[str, Markup]]:
    """Return the charts over all plans, each with its heading."""
    found: list[tuple[str, str]] = []
    if any(report.frontier.values()):
        found.append(("Quality and speed", charts.frontier(report.frontier, report.quality)))
    if any(section.saved for section in report.sections):
        found.append(("Where the work went", charts.savings_bars(report.sections)))
    if any(section.caches for section in report.sections):
        found.append(("Memory of caches", charts.held(report.sections)))
    return [(heading, Markup(drawn)) for heading, drawn in found]


def _section(section: PlanSection) -> dict[str, Any]:
    return {
        "name": section.name,
        "facts": section.facts,
        "steps": range(section.plan.sampler.steps),
        "rows": cells(section),
        "legend": _used(section),
        "saved": [
            (
                pair[0].shortcut.value,
                str(pair[0].entries),
                f"{pair[0].share:.1%}",
                f"{pair[1].share:.1%}",
            )
            for pair in section.saved
        ],
        "pictures": section.pictures,
        "lifetimes": Markup(charts.lifetimes(section.caches)) if section.caches else "",
        "declined": section.declined,
    }


def _used(section: PlanSection) -> Sequence[Strategy]:
    used = {strategy for row in section.plan.strategies for strategy in row}
    return [strategy for strategy in every_strategy() if strategy in used]
