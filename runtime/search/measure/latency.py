"""Measure what each strategy costs at each kind of site, on this device.

The unit is the whole step: all sites of a kind take the strategy at once and the step's time is
compared with the dense one's. So the price includes what is eliminated along with an attention
(norms, projections) and what a shortcut adds (storing residuals). Each kind is priced with the
others computed. All kinds together save less than the sum; that is measured too, and prices are
scaled to match. Where heads are split, the first group is a kind of its own: what feeds all groups
is eliminated only if all of them are shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.actions import DENSE, SiteAction
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import legal_strategies
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.measure.profile import window_forms
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.steppers import EagerVariant, Variants

_REPETITIONS = 3  # the first warms up, and is seldom the fastest
_STORING = "storing a residual"
_Row = tuple[str, str]  # a group, and a strategy's name or ``_STORING``
_Acting = tuple[tuple[SiteAction, ...], tuple[Site, ...]]


class Objective(StrEnum):
    """Name what a search reduces."""

    LATENCY = "latency"  # measured seconds
    FLOPS = "flops"  # of matrix products; counted, the same on every machine
    ATTENTION_FLOPS = "attention-flops"


@dataclass(frozen=True)
class CostTable:
    """Hold prices, in seconds or in operations.

    What shares guidance and refreshes the residual is priced with storing it.

    ``step`` is a dense step's; ``sites[i][strategy]`` what site ``i`` adds to a step in which it
    is shared, and ``residual[i]`` what storing a residual at a full step adds. At the steps
    ``skipped`` the model does not run, and nothing costs anything.
    """

    step: float
    sites: tuple[dict[Strategy, float], ...]
    residual: tuple[float, ...]
    skipped: frozenset[int] = frozenset()

    def row(self, strategies: Sequence[Strategy], stores: Sequence[bool]) -> float:
        """Return the price of one step; ``stores`` says which sites store a residual."""
        total = self.step
        for index, strategy in enumerate(strategies):
            prices = self.sites[index]
            total += prices[strategy] - prices[Strategy.FULL]
            total += self.residual[index] if stores[index] else 0.0
        return total

    def column(self, site: int, strategies: Sequence[Strategy]) -> float:
        """Return what one site adds to a generation."""
        stored = sum(_stores(strategies)) * self.residual[site]
        return sum(self.sites[site][strategy] for strategy in strategies) + stored

    def speedup(self, rows: Sequence[Sequence[Strategy]], merge_variants: bool = False) -> float:
        """Return the dense price of a generation over the plan's."""
        return self.step * len(rows) / self.plan(rows, merge_variants)

    def plan(self, rows: Sequence[Sequence[Strategy]], merge_variants: bool = False) -> float:
        """Return the price of a generation; merged variants store what any of their steps must."""
        stores = list(zip(*(_stores(column) for column in zip(*rows, strict=True)), strict=True))
        if merge_variants:
            union: dict[tuple[Strategy, ...], tuple[bool, ...]] = {}
            for row, kept in zip(rows, stores, strict=True):
                before = union.get(tuple(row), kept)
                union[tuple(row)] = tuple(map(any, zip(before, kept, strict=True)))
            stores = [union[tuple(row)] for row in rows]
        pairs = enumerate(zip(rows, stores, strict=True))
        return sum(self.row(row, kept) for step, (row, kept) in pairs if step not in self.skipped)


def _stores(column: Sequence[Strategy]) -> list[bool]:
    """Return at which full steps a site must store the residual that later windows read."""
    stores: list[bool] = []
    wanted = False
    for strategy in reversed(column):
        stores.append(wanted and strategy == Strategy.FULL)
        wanted = strategy.windowed or (wanted and not strategy.refreshes_residual)
    return stores[::-1]


def measure_costs(
    variants: Variants, objective: Objective, repetitions: int = _REPETITIONS
) -> tuple[CostTable, ...]:
    """Price each strategy, for each form of window; sites of equal shape share their prices.

    Caches keep the model's own dtype here: compiled, a conversion is fused into other loops, but
    the uncompiled graphs that are timed would pass over memory once more.
    """
    session = variants.session
    every = tuple(site.with_caches_in(None) for site in session.sites)
    groups: dict[Any, list[int]] = {}
    for index, site in enumerate(every):
        legal = _shortcuts(site, session.layout)
        shape = (site.kind, site.tokens, site.text, site.heads, site.head_dim, site.windows)
        key = (*shape, site.first_head > 0, legal)
        groups.setdefault(key, []).append(index)
    rows = _everywhere(every)
    for members in groups.values():
        rows |= _group_rows(every, members, session.layout)
    built = {name: variants.get(*row) for name, row in rows.items()}
    if objective is Objective.LATENCY:
        whole = _time(built, session.example, variants.results, repetitions)
    else:
        whole = _count(built, objective)
    step, together = whole[_FULL], whole[_FULL] - whole[_SHARED]
    forms = [
        {
            g: _group_prices(whole, members, _halves(session, members), form)
            for g, members in enumerate(groups.values())
        }
        for form in range(window_forms(session.sites))
    ]
    prices = forms[0]
    alone = sum(len(m) * prices[g][Strategy.FULL.name] for g, m in enumerate(groups.values()))
    factor = together / alone if alone > 0.0 and together > 0.0 else 1.0
    group_of = {index: g for g, members in enumerate(groups.values()) for index in members}
    found = [[form[group_of[index]] for index in range(len(session.sites))] for form in forms]
    return tuple(_table(step, each, factor) for each in found)


def _table(step: float, found: Sequence[dict[str, float]], factor: float) -> CostTable:
    return CostTable(
        step=step,
        sites=tuple(
            {s: factor * each.get(s.name, float("inf")) for s in strategies()} for each in found
        ),
        residual=tuple(factor * each.get(_STORING, 0.0) for each in found),
    )


_FULL: _Row = ("all", Strategy.FULL.name)
_SHARED: _Row = ("all", Strategy.SHARE_STEP.name)


def _everywhere(sites: tuple[Site, ...]) -> dict[_Row, _Acting]:
    """Return the rows in which all sites are computed, or all shared."""
    return {
        _FULL: (tuple(SiteAction(Strategy.FULL, writes_output=True) for _ in sites), sites),
        _SHARED: (tuple(SiteAction(Strategy.SHARE_STEP) for _ in sites), sites),
    }


def _group_rows(
    every: tuple[Site, ...], members: Sequence[int], layout: CfgLayout
) -> dict[_Row, _Acting]:
    """Return the rows in which one group takes a strategy and the others are computed."""
    site, first = every[members[0]], str(members[0])
    apart = layout is CfgLayout.SEPARATE  # a call computes its branch, or takes the other's output
    actions: dict[str, SiteAction] = {
        strategy.name: SiteAction(strategy, writes_residual=strategy.refreshes_residual)
        for strategy in _shortcuts(site, layout)
        if not (apart and strategy.shares_guidance)
    }
    if site.windows:
        storing = SiteAction(Strategy.FULL, writes_output=True, writes_residual=True)
        actions[_STORING] = storing
    rows: dict[_Row, _Acting] = {
        (first, name): _acting(every, members, action) for name, action in actions.items()
    }
    of_windows = [name for name in _of_windows() if name in actions]
    for form in range(1, len(site.windows)):
        sites = tuple(
            replace(other, window=other.windows[form]) if index in members else other
            for index, other in enumerate(every)
        )
        for name in of_windows:
            rows[first, _in_form(name, form)] = _acting(sites, members, actions[name])
    return rows


def _in_form(name: str, form: int) -> str:
    """Name a strategy in a form of window other than the first."""
    return f"{name}, form {form}" if form else name


def _halves(session: Session, members: Sequence[int]) -> dict[Strategy, Strategy]:
    if session.layout is not CfgLayout.SEPARATE:
        return {}
    legal = _shortcuts(session.sites[members[0]], session.layout)
    return {each: each.for_both_branches for each in legal if each.shares_guidance}


def _shortcuts(site: Site, layout: CfgLayout) -> tuple[Strategy, ...]:
    return tuple(each for each in legal_strategies(site, layout) if each != Strategy.FULL)


def _of_windows() -> tuple[str, ...]:
    """Return the names of what depends on the form of the window."""
    return (*(each.name for each in strategies() if each.needs_window), _STORING)


def _group_prices(
    whole: dict[_Row, float], members: Sequence[int], halves: Mapping[Strategy, Strategy], form: int
) -> dict[str, float]:
    """Return the prices per site of one group: what each strategy costs above the cheapest.

    ``halves`` maps a strategy that shares guidance between two calls to what the first call does;
    the second one shares its output. Windows have the form ``form``, or the first one if the group
    lacks it.
    """
    every = {name: price for (first, name), price in whole.items() if first == str(members[0])}
    cheapest = min(price for name, price in every.items() if not name.startswith(_STORING))
    cheapest = min(cheapest, whole[_FULL])
    own = {name: price for name, price in every.items() if ", form" not in name}
    own |= {
        name: every.get(_in_form(name, form), own[name]) for name in _of_windows() if name in own
    }
    stored = own.pop(_STORING, whole[_FULL])
    own[Strategy.FULL.name] = whole[_FULL]
    own |= _prices_of_reuse(own)
    shared = own[Strategy.SHARE_STEP.name]
    for both, first in halves.items():
        alone = stored if both.refreshes_residual else own[first.name]
        own[both.name] = (alone + shared) / 2.0
    each = {name: (price - cheapest) / len(members) for name, price in own.items()}
    each[_STORING] = max(0.0, stored - whole[_FULL]) / len(members)
    return each


def _prices_of_reuse(prices: Mapping[str, float]) -> dict[str, float]:
    """Return the price of each strategy that reuses outputs, at most that of any doing more.

    Repeating an output does nothing that the others do not do as well, a line less than a
    parabola. A timing that says otherwise is noise, and plans would follow it.
    """
    reusing = sorted(
        (each for each in strategies() if each.outputs_read and each.name in prices),
        key=lambda strategy: strategy.outputs_read,
        reverse=True,
    )
    least = {each.name: prices[each.name] for each in reusing}
    for more, less in pairwise(reusing):
        least[less.name] = min(least[less.name], least[more.name])
    computed = [price for name, price in prices.items() if name not in least]
    least[reusing[-1].name] = min(least[reusing[-1].name], *computed)
    return least


def _acting(sites: tuple[Site, ...], members: Sequence[int], action: SiteAction) -> _Acting:
    return tuple(action if index in members else DENSE for index in range(len(sites))), sites


def _count(built: dict[_Row, EagerVariant], objective: Objective) -> dict[_Row, float]:
    whole = objective is Objective.FLOPS
    return {
        name: float(variant.flops.total if whole else variant.flops.attention)
        for name, variant in built.items()
    }


def _time(
    built: dict[_Row, EagerVariant], example: Sequence[Tensor], results: int, repetitions: int
) -> dict[_Row, float]:
    """Return the least seconds of each variant, the sample least disturbed; variants take turns.

    Rows that make the same variant are timed once.
    """
    caches: dict[Slot, Tensor] = {}
    unit = torch.ones((), device=example[0].device)  # any factor
    with torch.no_grad():
        for variant in built.values():
            if not variant.reads:
                returned = variant.module(*example)
                caches |= zip(variant.writes, returned[results:], strict=True)
        distinct = {id(variant): variant for variant in built.values()}
        samples: dict[int, list[float]] = {key: [] for key in distinct}
        for _ in range(repetitions):
            for key, variant in distinct.items():
                slots = [slot.latest for slot in variant.reads]  # an older output is like the last
                inputs = [*example, *(caches.get(slot, unit) for slot in slots)]
                samples[key].append(_seconds(partial(variant.module, *inputs)))
    return {name: min(samples[id(variant)]) for name, variant in built.items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
