"""Where heads are split into groups: what the whole attention does, and when its groups are idle.

If all groups of an attention share at a step, the whole attention shares instead, at its own exit
nodes after the output projection. So the sites of a step program include the whole attentions,
after their groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ditfastattn.passes.analysis.site import Site, with_wholes
from ditfastattn.passes.plan.actions import SiteAction, site_actions
from ditfastattn.passes.plan.guidance import GuidanceCall
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.strategies import Strategy, computing

Column = list[Strategy]


def with_whole_columns(
    sites: Sequence[Site],
    rows: Sequence[Sequence[Strategy]],
    merge_variants: bool,
    idle: Sequence[Collection[int]],
) -> tuple[tuple[Site, ...], list[Column], list[Collection[int]]]:
    """Return ``sites`` and the attentions whose groups they are, with a column of each.

    At the steps ``idle`` of a site it does nothing, as one that holds it is reused; so do the
    attentions, whose steps are returned too.
    """
    columns = [[row[index] for row in rows] for index in range(len(sites))]
    every, resting = with_wholes(sites), list(idle)
    for whole in every[len(sites) :]:
        groups = [place for place, site in enumerate(sites) if _is_group_of(site, whole)]
        group_rows = list(zip(*(columns[place] for place in groups), strict=True))
        skipped = idle[groups[0]]
        column = _together(whole, group_rows, skipped)
        if merge_variants:  # steps of the same strategies do the same
            kept = {tuple(r) for r, own in zip(rows, column, strict=True) if own.computes}
            column = _together(whole, group_rows, skipped, [tuple(row) in kept for row in rows])
        columns.append(column)
        resting.append(skipped)
    return every, columns, resting


def _is_group_of(site: Site, whole: Site) -> bool:
    return site.whole is not None and site.whole.name == whole.name


def _together(
    whole: Site,
    rows: Sequence[Sequence[Strategy]],
    skipped: Collection[int],
    must_compute: Sequence[bool] = (),
) -> Column:
    """Return what the whole attention does at each step, when its groups do ``rows``.

    When all groups repeat their last output, the whole one repeats its own, unless a group has
    combined earlier outputs since: what it repeats is what it computed before. When each computes
    one guidance branch alone, so does the whole. At the steps ``must_compute`` it repeats nothing.
    At the steps ``skipped`` neither runs.
    """
    column: Column = []
    last: Sequence[Strategy] = ()
    for step, row in enumerate(rows):
        if step in skipped:
            column.append(Strategy.SHARE_STEP)
            continue
        repeats = all(strategy.repeats for strategy in row)
        combined = any(not strategy.computes and not strategy.repeats for strategy in last)
        if repeats and not combined and not any(must_compute[step : step + 1]):
            column.append(row[0])
            continue
        last = row
        shared = computing(windowed=False, shares_guidance=True)
        shares = all(strategy.shares_guidance for strategy in row) and not why_not(shared, whole)
        column.append(shared if shares else Strategy.FULL)
    return column


def columns_of_actions(
    sites: Sequence[Site],
    columns: Sequence[Column],
    call: GuidanceCall,
    idle: Sequence[Collection[int]],
) -> list[list[SiteAction]]:
    """Return the actions of each site, which does nothing at its steps of ``idle``.

    A group is idle while the whole attention repeats, too.
    """
    repeating = {
        site.name: {step for step, strategy in enumerate(column) if not strategy.computes}
        for site, column in zip(sites, columns, strict=True)
    }
    return [
        site_actions(column, call, _alone(site, repeating) | set(resting))
        for site, column, resting in zip(sites, columns, idle, strict=True)
    ]


def _alone(site: Site, repeating: Mapping[str, set[int]]) -> set[int]:
    return repeating.get(site.whole.name, set()) if site.whole else set()
