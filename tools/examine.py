"""Examine a plan on its model without compiling it: prices, caches, and what was declined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.plan.guidance import calls_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.passes.rewrites.pipeline import unroll_available
from ditfastattn.runtime.matching import planned_sites
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.latency import CostTable, Objective, measure_costs
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import Variants
from ditfastattn.tools.savings import Prices


@dataclass(frozen=True)
class Examined:
    """Hold the price of each strategy in operations and in seconds, the caches, and the sites."""

    prices: tuple[Prices, Prices]
    caches: tuple[CacheSlot, ...]
    sites: SiteReport


def examine_plan(pipeline: Any, plan: Plan, prompt: Prompt) -> Examined:
    """Count and time each strategy at each site of ``plan``, and unroll it.

    The seconds are of the graph run uncompiled, on this device.

    Raises:
        ConfigError: the pipeline's model cannot be captured, or the plan does not match it.
    """
    layout = plan.sampler.cfg_layout
    with open_session(pipeline, prompt, layout, head_groups=plan.head_groups or 1) as session:
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
    prices = _prices("flops", counted, names, plan), _prices("seconds", timed, names, plan)
    return Examined(prices, caches, report)


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
