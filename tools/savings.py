"""What each kind of shortcut of a plan saves, from the price of every strategy at every site."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ditfastattn.core.records import Record
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy


class Shortcut(StrEnum):
    """Name what a plan saves by; an entry of a plan is at most one of these."""

    WINDOW = "window + residual"
    GUIDANCE = "guidance shared"
    BOTH = "window + residual, guidance shared"
    STEP = "step shared"
    WHOLE_STEP = "whole step skipped"


# Of each entry of a plan, ``[step][site]``: how much it changes its site's output, relative to it.
Errors = tuple[tuple[float | None, ...], ...]


class Prices(Record, frozen=True):
    """Hold the price of a dense step, and of each strategy at each site of a plan, by its name.

    A price of 0 is that of the cheapest strategy there. ``unit`` is ``flops`` or ``seconds``; an
    output site has no prices: where it is reused, the whole step is saved.
    """

    unit: str
    step: float
    sites: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Saving:
    """Say how often a plan takes a shortcut, and the share of the dense price that it saves."""

    shortcut: Shortcut
    entries: int
    share: float


def shortcut_of(strategy: Strategy, kind: SiteKind) -> Shortcut | None:
    """Return what a site of ``kind`` saves by; None where it computes in full."""
    if not strategy.computes:
        return Shortcut.WHOLE_STEP if kind is SiteKind.OUTPUT else Shortcut.STEP
    if strategy.windowed:
        return Shortcut.BOTH if strategy.shares_guidance else Shortcut.WINDOW
    return Shortcut.GUIDANCE if strategy.shares_guidance else None


def saved_entries(plan: Plan, prices: Prices) -> list[list[float]]:
    """Return the price that each entry of ``plan`` saves, ``[step][site]``.

    A skipped step saves the whole step's price at the output, and nothing elsewhere.
    """
    found: list[list[float]] = []
    for row in plan.strategies:
        skips = [
            site.kind is SiteKind.OUTPUT and not strategy.computes
            for site, strategy in zip(plan.sites, row, strict=True)
        ]
        if any(skips):
            found.append([prices.step if skip else 0.0 for skip in skips])
            continue
        found.append(
            [
                listed[Strategy.FULL.name] - listed[strategy.name] if listed else 0.0
                for listed, strategy in zip(prices.sites, row, strict=True)
            ]
        )
    return found


def savings(plan: Plan, prices: Prices) -> list[Saving]:
    """Return what each kind of shortcut saves, those that the plan does not take included."""
    counts = dict.fromkeys(Shortcut, 0)
    saved = dict.fromkeys(Shortcut, 0.0)
    whole = prices.step * plan.sampler.steps
    for row, amounts in zip(plan.strategies, saved_entries(plan, prices), strict=True):
        whole_step = any(
            shortcut_of(strategy, site.kind) is Shortcut.WHOLE_STEP
            for site, strategy in zip(plan.sites, row, strict=True)
        )
        for site, strategy, amount in zip(plan.sites, row, amounts, strict=True):
            kind = shortcut_of(strategy, site.kind)
            if kind is None or (whole_step and kind is not Shortcut.WHOLE_STEP):
                continue  # in a skipped step the other sites are idle
            counts[kind] += 1
            saved[kind] += amount
    return [Saving(kind, counts[kind], saved[kind] / whole) for kind in Shortcut]
