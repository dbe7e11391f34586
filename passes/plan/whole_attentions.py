"""Where heads are split into groups: what the whole attention does, and when its groups are idle.

If all groups of an attention share at a step, the whole attention shares instead, at its own exit
nodes after the output projection. So the sites of a step program include the whole attentions,
after their groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ditfastattn.passes.analysis.site import Site, SiteKind, with_wholes
from ditfastattn.passes.plan.actions import SiteAction, site_actions
from ditfastattn.passes.plan.guidance import GuidanceCall
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.strategies import Strategy, computing

Column = list[Strategy]


def with_whole_columns(
    sites: Sequence[Site],
    rows: Sequence[Sequence[Strategy]],
    merge_variants: bool,
    skipped: Collection[int] = (),
) -> tuple[tuple[Site, ...], list[Column]]:
    """Return ``sites`` and the attentions whose groups they are, with a column of each."""
    columns = [[row[index] for row in rows] for index in range(len(sites))]
    every = with_wholes(sites)
    for whole in every[len(sites) :]:
        pairs = zip(sites, columns, strict=False)
        groups = [column for site, column in pairs if _is_group_of(site, whole)]
        group_rows = list(zip(*groups, strict=True))
        column = _together(whole, group_rows, skipped)
        if merge_variants:  # steps of the same strategies do the same
            kept = {tuple(r) for r, own in zip(rows, column, strict=True) if own.computes}
            column = _together(whole, group_rows, skipped, [tuple(row) in kept for row in rows])
        columns.append(column)
    return every, columns


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
    skipped: Collection[int] = (),
) -> list[list[SiteAction]]:
    """Return the actions of each site.

    A group is idle while the whole attention repeats, and all but the output at steps ``skipped``.
    """
    repeating = {
        site.name: {step for step, strategy in enumerate(column) if not strategy.computes}
        for site, column in zip(sites, columns, strict=True)
    }
    return [
        site_actions(column, call, _idle(site, repeating, skipped))
        for site, column in zip(sites, columns, strict=True)
    ]


def _idle(
    site: Site, repeating: Mapping[str, set[int]], skipped: Collection[int]
) -> Collection[int]:
    if site.kind is SiteKind.OUTPUT:
        return ()
    alone = repeating.get(site.whole.name, set()) if site.whole else set()
    return alone | set(skipped)


def skipped_steps(sites: Sequence[Site], rows: Sequence[Sequence[Strategy]]) -> frozenset[int]:
    """Return the steps at which the model's whole output is reused, so that nothing else runs."""
    whole = [index for index, site in enumerate(sites) if site.kind is SiteKind.OUTPUT]
    pairs = ((step, index) for step in range(len(rows)) for index in whole)
    return frozenset(step for step, index in pairs if not rows[step][index].computes)
