"""Adapt what sites do to other steps, another resolution, other phases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.plan.legality import START, why_not
from ditfastattn.passes.plan.nesting import held_by
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.runtime.matching import holding_sites
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.solve.rows import Row

log = logging.getLogger(__name__)


def retarget_rows(plan: Plan, session: Session, begin: int = 0, steps: int = 0) -> list[Row]:
    """Return ``plan``'s strategies for the steps and sites of ``session``; a legal schedule.

    A session of one phase begins at step ``begin`` of so many ``steps``.

    A step takes the row of the plan's step nearest to its relative position, the earlier of two;
    the first step is full. A site that the plan does not list is full, and so is one where its
    strategy is not legal here, or extrapolates before enough steps have computed an output; these
    are reported in the log.
    """
    known = {site.name: index for index, site in enumerate(plan.sites)}
    reasons: dict[str, str] = {}
    histories = {site.name: START.after(Strategy.FULL) for site in session.sites}

    def choose(old: Row, site: Site) -> Strategy:
        if site.name not in known:
            reasons[site.name] = "the plan does not list this site"
            return Strategy.FULL
        wanted = old[known[site.name]]
        reason = why_not(wanted, site, session.layout, histories[site.name])
        if reason:
            reasons[f"{site.name}, {wanted}"] = reason
        return Strategy.FULL if reason else wanted

    held = held_by(session.sites)
    rows: list[Row] = [(Strategy.FULL,) * len(session.sites)]
    for step in range(1, session.steps):
        old = plan.strategies[nearest(begin + step, steps or session.steps, plan.sampler.steps)]
        row = [choose(old, site) for site in session.sites]
        for place, inside in enumerate(held):
            if (
                inside
                and row[place].computes
                and not old[known[session.sites[place].name]].computes
            ):
                for idle in inside:  # in the plan; here the blocks run
                    row[idle] = Strategy.FULL
        rows.append(tuple(row))
        for site, strategy in zip(session.sites, rows[-1], strict=True):
            histories[site.name] = histories[site.name].after(strategy)
    _report(plan, session, reasons)
    return rows


def as_planned(plan: Plan, session: Session) -> list[Site]:
    """Return the session's sites with caches kept as in the plan, windows of its form, its ranges.

    Windows are the plan's own if the number of tokens is the same; otherwise they cover the same
    fraction of the sequence, or of the grid, as in any plan.
    """
    known = {site.name: site for site in plan.sites}
    sites: list[Site] = []
    for site in session.sites:
        planned = known.get(site.name)
        if planned is None:
            sites.append(site)
            continue
        kept = site.with_caches_in(planned.cache_dtype)
        if not planned.window:
            sites.append(kept)
            continue
        alike = [form for form in site.windows if _axes(form) == _axes(planned.window)]
        same = planned.tokens == site.tokens
        sites.append(replace(kept, window=planned.window if same else (*alike, site.window)[0]))
    ranges = [site for site in plan.sites if site.kind is SiteKind.BLOCKS]
    for site in holding_sites(ranges, session.captured, session.sites):
        sites.append(site.with_caches_in(known[site.name].cache_dtype))
    return sites


def _axes(window: Window) -> int:
    """Return how many axes the tiles of ``window`` have; 0 of a band."""
    return len(window.grid) if isinstance(window, TileWindow) else 0


def nearest(step: int, steps: int, old_steps: int) -> int:
    """Return the old step nearest to step / (steps - 1) of the way; the earlier of two."""
    whole = steps - 1
    return (2 * step * (old_steps - 1) + whole - 1) // (2 * whole)


def _report(plan: Plan, session: Session, reasons: Mapping[str, str]) -> None:
    log.info(
        "retarget: %d to %d steps, %d to %d sites",
        plan.sampler.steps,
        session.steps,
        len(plan.sites),
        len(session.sites),
    )
    if reasons:
        log.warning(
            "ditfastattn: retarget: %d shortcuts are not legal here, and became full attention",
            len(reasons),
        )
    for what, reason in reasons.items():
        log.info("retarget: full: %s: %s", what, reason)
