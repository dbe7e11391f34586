"""What each kind of shortcut of a plan saves, from the price of every strategy at every site."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ditfastattn.core.records import Record
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.nesting import held_by, idle_steps
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy


class Shortcut(StrEnum):
    """Name what a plan saves by; an entry of a plan is at most one of these."""

    WINDOW = "window + residual"
    GUIDANCE = "guidance shared"
    BOTH = "window + residual, guidance shared"
    STEP = "step shared"
    BLOCKS = "blocks skipped"
    WHOLE_STEP = "whole step skipped"


# Of each entry of a plan, ``[step][site]``: how much it changes its site's output, relative to it.
Errors = tuple[tuple[float | None, ...], ...]


class Prices(Record, frozen=True):
    """Hold the price of a dense step, and of each strategy at each site of a plan, by its name.

    A price of 0 is that of the cheapest strategy there. ``unit`` is ``flops`` or ``seconds``; an
    output site has no prices: where it is reused, the whole step is saved. Nor has a range of
    blocks: where it is reused, what its attentions and feed-forwards cost is saved, and a little
    more that is not counted.
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
        holders = {SiteKind.OUTPUT: Shortcut.WHOLE_STEP, SiteKind.BLOCKS: Shortcut.BLOCKS}
        return holders.get(kind, Shortcut.STEP)
    if strategy.windowed:
        return Shortcut.BOTH if strategy.shares_guidance else Shortcut.WINDOW
    return Shortcut.GUIDANCE if strategy.shares_guidance else None


def saved_entries(plan: Plan, prices: Prices) -> list[list[float]]:
    """Return the price that each entry of ``plan`` saves, ``[step][site]``.

    A skipped step saves the whole step's price at the output, and nothing elsewhere; skipped blocks
    save what lies within at their range.
    """
    held, idle = held_by(plan.sites), idle_steps(plan.sites, plan.strategies)

    def saved(step: int, place: int) -> float:
        site, strategy = plan.sites[place], plan.strategies[step][place]
        if step in idle[place]:
            return 0.0
        if site.kind is SiteKind.OUTPUT:
            return 0.0 if strategy.computes else prices.step
        if site.kind is SiteKind.BLOCKS:
            return 0.0 if strategy.computes else sum(map(full, held[place]))
        listed = prices.sites[place]
        return listed[Strategy.FULL.name] - listed[strategy.name] if listed else 0.0

    def full(place: int) -> float:
        return prices.sites[place].get(Strategy.FULL.name, 0.0)

    steps, places = range(plan.sampler.steps), range(len(plan.sites))
    return [[saved(step, place) for place in places] for step in steps]


def savings(plan: Plan, prices: Prices) -> list[Saving]:
    """Return what each kind of shortcut saves, those that the plan does not take included."""
    counts = dict.fromkeys(Shortcut, 0)
    saved = dict.fromkeys(Shortcut, 0.0)
    whole = prices.step * plan.sampler.steps
    idle = idle_steps(plan.sites, plan.strategies)
    for step, amounts in enumerate(saved_entries(plan, prices)):
        for place, site in enumerate(plan.sites):
            kind = shortcut_of(plan.strategies[step][place], site.kind)
            if kind is None or step in idle[place]:
                continue
            counts[kind] += 1
            saved[kind] += amounts[place]
    return [Saving(kind, counts[kind], saved[kind] / whole) for kind in Shortcut]
