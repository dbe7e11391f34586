"""What each site does at each step: its strategy, and which caches later steps will read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.guidance import GuidanceCall
from ditfastattn.passes.plan.strategies import Strategy

ActionRow = tuple["SiteAction", ...]


@dataclass(frozen=True)
class SiteAction:
    """Say what one site does in one step variant, and which of its caches later steps read."""

    strategy: Strategy
    writes_output: bool = False
    writes_residual: bool = False


DENSE = SiteAction(Strategy.FULL)


def site_actions(
    column: Sequence[Strategy], call: GuidanceCall, idle: Collection[int] = ()
) -> list[SiteAction]:
    """Return the actions of one site: what later steps, or its second call, will read is written.

    What the site would reuse at the steps ``idle`` is never read.
    """
    actions: list[SiteAction] = []
    outputs_wanted, residual_wanted = 0, False  # how many of the outputs computed last
    for step in reversed(range(len(column))):
        strategy = column[step]
        if step in idle:
            actions.append(DENSE)  # dead, and erased
            continue
        adopts = strategy.shares_guidance and call is GuidanceCall.SECOND
        wanted = outputs_wanted > 0 or (strategy.shares_guidance and call is GuidanceCall.FIRST)
        if adopts:
            actions.append(SiteAction(Strategy.SHARE_STEP))  # of the first call's output
        else:
            writes_residual = strategy.refreshes_residual and residual_wanted
            actions.append(SiteAction(strategy, strategy.computes and wanted, writes_residual))
        outputs_wanted = max(outputs_wanted - strategy.computes, strategy.outputs_read)
        reads = strategy.windowed and not adopts
        residual_wanted = reads or (residual_wanted and not strategy.refreshes_residual)
    return actions[::-1]


def merge_writes(rows: Sequence[ActionRow]) -> list[ActionRow]:
    """Give rows of the same strategies the union of their writes."""
    alike: dict[tuple[Strategy, ...], list[ActionRow]] = {}
    for row in rows:
        alike.setdefault(tuple(action.strategy for action in row), []).append(row)
    merged = {
        key: tuple(
            SiteAction(
                strategy,
                writes_output=any(action.writes_output for action in actions),
                writes_residual=any(action.writes_residual for action in actions),
            )
            for strategy, actions in zip(key, zip(*group, strict=True), strict=True)
        )
        for key, group in alike.items()
    }
    return [merged[tuple(action.strategy for action in row)] for row in rows]


def leave_copying_to_wholes(sites: Sequence[Site], row: ActionRow) -> ActionRow:
    """Let the whole attention copy one guidance branch, instead of its groups of heads."""
    pairs = list(zip(sites, row, strict=True))
    copying = {
        site.name
        for site, action in pairs
        if site.whole is None and action.strategy.shares_guidance
    }
    return tuple(
        replace(action, strategy=action.strategy.for_both_branches)
        if site.whole is not None and site.whole.name in copying and not _writes(action)
        else action
        for site, action in pairs
    )


def _writes(action: SiteAction) -> bool:
    """Return whether later steps read what the site computes, of one guidance branch."""
    return action.writes_output or action.writes_residual
