"""Examine a plan on its model without compiling it: prices, caches, and what was declined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.passes.rewrites.pipeline import unroll_available
from ditfastattn.runtime.matching import planned_sites
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.measure.error_table import ErrorTable, error_table
from ditfastattn.runtime.search.measure.latency import CostTable, Objective, measure_costs
from ditfastattn.runtime.search.measure.profile import Profiler
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import Variants
from ditfastattn.runtime.search.solve.problem import reads
from ditfastattn.tools.savings import Errors, Prices


@dataclass(frozen=True)
class Examined:
    """Hold what is known of a plan and its model before anything is compiled.

    Attributes:
        prices: of each strategy, in operations and in seconds.
        errors: how much each entry of the plan changes its site's output, see ``plan_errors``.
        caches: the cache slots.
        sites: the sites that were found, and what was declined.
    """

    prices: tuple[Prices, Prices]
    errors: Errors
    caches: tuple[CacheSlot, ...]
    sites: SiteReport


def examine_plan(pipeline: Any, plan: Plan, prompt: Prompt) -> Examined:
    """Count and time each strategy at each site of ``plan``, measure its errors, and unroll it.

    The seconds are of the graph run uncompiled, on this device; the errors are those on one dense
    generation of ``prompt``.

    Raises:
        ConfigError: the pipeline's model cannot be captured, or the plan does not match it.
    """
    layout = plan.sampler.cfg_layout
    groups = plan.head_groups or 1
    with (
        text_padded(pipeline, plan.text),
        open_session(pipeline, prompt, layout, head_groups=groups) as session,
    ):
        captured = session.captured
        report = find_sites(captured)
        chosen = planned_sites(plan, captured, session.sites, session.identity)
        caches = tuple(
            slot
            for call in calls_of(layout)
            for slot in unroll_available(
                plan.strategies, captured, chosen, plan.merge_variants, call
            ).slots.slots
        )
        session.take_sites(_as_planned(plan, session.sites))
        names = [site.name for site in session.sites]
        variants = Variants(session)
        counted, timed = (
            measure_costs(variants, objective)[0]
            for objective in (Objective.FLOPS, Objective.LATENCY)
        )
        profiler = Profiler(session)
        session.run(profiler, prompt)
        table = error_table([profiler.sketch()], session.sites, session.layout)
    prices = _prices("flops", counted, names, plan), _prices("seconds", timed, names, plan)
    return Examined(prices, plan_errors(plan, table, names), caches, report)


def plan_errors(plan: Plan, table: ErrorTable, names: Sequence[str]) -> Errors:
    """Return how much each entry of ``plan`` changes its site's output, ``[step][site]``.

    The error is relative, with the caches of the dense generation that ``table`` is of; ``names``
    are the sites of the table. It is None where it is unknown: at the model's output.
    """
    columns: list[list[float | None]] = []
    for site, column in zip(plan.sites, zip(*plan.strategies, strict=True), strict=True):
        if site.kind is SiteKind.OUTPUT or site.name not in names:
            columns.append([None] * len(column))
            continue
        index = names.index(site.name)
        found = [
            table.of(each, step, source, index, gaps) for step, each, source, gaps in reads(column)
        ]
        columns.append([round(error, 4) if math.isfinite(error) else None for error in found])
    return tuple(zip(*columns, strict=True))


def _as_planned(plan: Plan, sites: Sequence[Site]) -> list[Site]:
    """Give ``sites`` the windows of the plan."""
    windows = {site.name: site.window for site in plan.sites}
    planned = [(site, windows.get(site.name)) for site in sites]
    return [
        replace(site, window=window, windows=(window,)) if window else site
        for site, window in planned
    ]


def _prices(unit: str, table: CostTable, names: Sequence[str], plan: Plan) -> Prices:
    known = {
        name: {each.name: price for each, price in listed.items() if price != float("inf")}
        for name, listed in zip(names, table.sites, strict=True)
    }
    listed = tuple(known.get(site.name, {}) for site in plan.sites)
    return Prices(unit=unit, step=table.step, sites=listed)
