"""Decide whether a site may take a strategy at a step: one function, which returns the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy, every_strategy, strategies


class SiteLimits(Protocol):
    """The limits of a site, each a reason or ""."""

    @property
    def kind(self) -> SiteKind:
        """Return the kind of the site."""
        ...

    @property
    def no_window(self) -> str:
        """Return why no window is legal."""
        ...

    @property
    def no_shared_guidance(self) -> str:
        """Return why the halves of the batch cannot share this site."""
        ...

    @property
    def no_fit(self) -> str:
        """Return why no coefficients can be fitted to its output."""
        ...


@dataclass(frozen=True)
class History:
    """Hold what a site can reuse: how many outputs it has computed, and whether a residual."""

    outputs: int = 0
    residual: bool = False

    def after(self, strategy: Strategy) -> History:
        """Return the history after a step under ``strategy``."""
        residual = self.residual or strategy.refreshes_residual
        return History(self.outputs + strategy.computes, residual)


START = History()
ANY = History(outputs=1 << 30, residual=True)  # late enough for every strategy


def why_not(
    strategy: Strategy,
    site: SiteLimits,
    layout: CfgLayout = CfgLayout.COND_FIRST,
    history: History = ANY,
) -> str:
    """Return why ``site`` may not take ``strategy`` under ``layout`` after ``history``, or ""."""
    if strategy.shares_guidance and (reason := _why_not_shared(site, layout)):
        return reason
    if strategy.needs_window and site.no_window:
        return site.no_window
    if strategy.fitted and site.no_fit:
        return site.no_fit
    if strategy.outputs_read and not history.outputs:
        return "no earlier step computes an output"
    if history.outputs < strategy.outputs_read:
        needed = f"it reads the outputs of {strategy.outputs_read} earlier steps"
        return f"{needed}, and only {history.outputs} of them compute one"
    if strategy.windowed and not history.residual:
        return "no earlier step computes the residual"
    return ""


def _why_not_shared(site: SiteLimits, layout: CfgLayout) -> str:
    if layout is CfgLayout.NONE:
        return "guidance is not batched (cfg_layout is none)"
    if layout is CfgLayout.SEPARATE_UNCOND_FIRST:
        return "the unconditional call comes first, when there is no output to share yet"
    # Between calls of their own the guidance branches need not be halves of a batch.
    separate = layout is CfgLayout.SEPARATE and not site.kind.holds_others
    return "" if separate else site.no_shared_guidance


def _table(site: SiteLimits) -> tuple[Strategy, ...]:
    return strategies() if site.no_fit else every_strategy()


def legal_strategies(
    site: SiteLimits, layout: CfgLayout = CfgLayout.COND_FIRST, history: History = ANY
) -> tuple[Strategy, ...]:
    """Return the strategies that ``site`` may take, in the table's order; ``FULL`` is one."""
    return tuple(each for each in _table(site) if not why_not(each, site, layout, history))


def declined_strategies(
    site: SiteLimits, layout: CfgLayout = CfgLayout.COND_FIRST
) -> dict[Strategy, str]:
    """Return the strategies that ``site`` may never take, with the reasons."""
    reasons = {each: why_not(each, site, layout) for each in _table(site)}
    return {each: reason for each, reason in reasons.items() if reason}


def first_fault(
    column: Sequence[Strategy], site: SiteLimits, layout: CfgLayout
) -> tuple[int, str] | None:
    """Return the first step at which ``column`` is not legal, with the reason, or None."""
    history = START
    for step, strategy in enumerate(column):
        reason = why_not(strategy, site, layout, history)
        if reason:
            return step, reason
        history = history.after(strategy)
    return None
