"""Measure what each strategy costs at each kind of site, on this device.

The unit is the whole step: all sites of a kind take the strategy at once and the step's time is
compared with the dense one's, so that what dies with an attention (norms, projections) and what a
shortcut adds (residual bookkeeping) are in the price. Each kind is priced with the others computed;
what all of them save together, which is less than the sum, is measured too and shared out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditfastattn.passes.caches import previous_of
from ditfastattn.passes.pipeline import DENSE, SiteAction
from ditfastattn.passes.plan import CfgLayout, Strategy
from ditfastattn.passes.sites import AttentionSite
from ditfastattn.runtime.search.session import Session
from ditfastattn.runtime.search.steppers import EagerVariant, Variants
from ditfastattn.runtime.site_evaluator import legal_strategies

_REPETITIONS = 5
_WARM_UP = 2  # rounds: the first ones of a process are slow
_STORING = "storing a residual"
_Row = tuple[str, str]  # what it is of, and the strategy


class Objective(StrEnum):
    """Name what a search saves."""

    LATENCY = "latency"  # measured seconds
    FLOPS = "flops"  # of matrix products; counted, the same on every machine
    ATTENTION_FLOPS = "attention-flops"


@dataclass(frozen=True)
class CostTable:
    """Hold prices, in seconds or in operations.

    ``step`` is a dense step's; ``sites[i][strategy]`` what site ``i`` adds to a step in which it
    is shared, and ``residual[i]`` what storing a residual at a full step adds.
    """

    step: float
    sites: tuple[dict[Strategy, float], ...]
    residual: tuple[float, ...]

    def row(self, strategies: Sequence[Strategy], stores: Sequence[bool]) -> float:
        """Return the price of one step; ``stores`` tells which sites store a residual."""
        total = self.step
        for index, strategy in enumerate(strategies):
            prices = self.sites[index]
            total += prices[strategy] - prices[Strategy.FULL]
            total += self.residual[index] if stores[index] else 0.0
        return total

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
        return sum(self.row(row, kept) for row, kept in zip(rows, stores, strict=True))


def _stores(column: Sequence[Strategy]) -> list[bool]:
    """Tell at which steps a site must store the residual that later windows read."""
    stores: list[bool] = []
    wanted = False
    for strategy in reversed(column):
        stores.append(wanted and strategy is Strategy.FULL)
        wanted = strategy.windowed or (wanted and strategy is not Strategy.FULL)
    return stores[::-1]


def measure_costs(
    variants: Variants, objective: Objective, repetitions: int = _REPETITIONS
) -> CostTable:
    """Price each strategy; sites of equal shape share their prices."""
    session = variants.session
    groups: dict[Any, list[int]] = {}
    for index, site in enumerate(session.sites):
        legal = legal_strategies(site, session.layout)
        key = (site.kind, site.tokens, site.heads, site.head_dim, site.window, legal)
        groups.setdefault(key, []).append(index)
    rows = _everywhere(session.sites)
    for members in groups.values():
        rows |= _group_rows(session, members)
    built = {name: variants.get(row) for name, row in rows.items()}
    if objective is Objective.LATENCY:
        whole = _time(built, session.example, variants.results, repetitions)
    else:
        whole = _count(built, objective)
    step, together = whole[_FULL], whole[_FULL] - whole[_SHARED]
    prices = {
        g: _group_prices(whole, members, _halves(session.sites[members[0]], session.layout))
        for g, members in enumerate(groups.values())
    }
    alone = sum(len(m) * prices[g][Strategy.FULL] for g, m in enumerate(groups.values()))
    factor = together / alone if alone > 0.0 and together > 0.0 else 1.0
    group_of = {index: g for g, members in enumerate(groups.values()) for index in members}
    found = [prices[group_of[index]] for index in range(len(session.sites))]
    return CostTable(
        step=step,
        sites=tuple(
            {strategy: factor * each.get(strategy, float("inf")) for strategy in Strategy}
            for each in found
        ),
        residual=tuple(factor * each.get(_STORING, 0.0) for each in found),
    )


_FULL: _Row = ("all", Strategy.FULL)
_SHARED: _Row = ("all", Strategy.SHARE_STEP)


def _everywhere(sites: Sequence[AttentionSite]) -> dict[_Row, tuple[SiteAction, ...]]:
    """Return the rows in which all sites are computed, or all shared."""
    return {
        _FULL: tuple(SiteAction(Strategy.FULL, writes_output=True) for _ in sites),
        _SHARED: tuple(SiteAction(Strategy.SHARE_STEP) for _ in sites),
    }


def _group_rows(session: Session, members: Sequence[int]) -> dict[_Row, tuple[SiteAction, ...]]:
    """Return the rows in which one group takes a strategy and the others are computed."""
    site, first = session.sites[members[0]], str(members[0])
    apart = session.layout is CfgLayout.SEPARATE  # a call computes a lane, or takes it from another
    rows: dict[_Row, tuple[SiteAction, ...]] = {
        (first, strategy): _acting(session.sites, members, SiteAction(strategy))
        for strategy in legal_strategies(site, session.layout)
        if not (apart and strategy.shares_cfg)
    }
    if site.window:
        storing = SiteAction(Strategy.FULL, writes_output=True, writes_residual=True)
        rows[first, _STORING] = _acting(session.sites, members, storing)
    return rows


def _halves(site: AttentionSite, layout: CfgLayout) -> dict[Strategy, Strategy]:
    if layout is not CfgLayout.SEPARATE:
        return {}
    found = {Strategy.SHARE_CFG: Strategy.FULL}
    if site.window:
        found[Strategy.WINDOW_SHARE_CFG] = Strategy.WINDOW
    return found


def _group_prices(
    whole: dict[_Row, float], members: Sequence[int], halves: Mapping[Strategy, Strategy]
) -> dict[str, float]:
    """Return the prices per site of one group: what each strategy costs above the cheapest.

    ``halves`` are strategies of two calls, of which the first does another and the second shares.
    """
    own = {name: price for (first, name), price in whole.items() if first == str(members[0])}
    stored = own.pop(_STORING, whole[_FULL])
    own[Strategy.FULL] = whole[_FULL]
    cheapest = min(own.values())
    own |= {both: (own[first] + own[Strategy.SHARE_STEP]) / 2.0 for both, first in halves.items()}
    each = {name: (price - cheapest) / len(members) for name, price in own.items()}
    each[_STORING] = max(0.0, stored - whole[_FULL]) / len(members)
    return each


def _acting(
    sites: Sequence[AttentionSite], members: Sequence[int], action: SiteAction
) -> tuple[SiteAction, ...]:
    return tuple(action if index in members else DENSE for index in range(len(sites)))


def _count(built: dict[_Row, EagerVariant], objective: Objective) -> dict[_Row, float]:
    whole = objective is Objective.FLOPS
    return {
        name: float(variant.flops.total if whole else variant.flops.attention)
        for name, variant in built.items()
    }


def _time(
    built: dict[_Row, EagerVariant], example: Sequence[Tensor], results: int, repetitions: int
) -> dict[_Row, float]:
    """Return the least seconds of each variant, which others disturb least; they take turns."""
    caches: dict[str, Tensor] = {}
    unit = torch.ones((), device=example[0].device)  # the distance of an extrapolation
    with torch.no_grad():
        for variant in built.values():
            if not variant.reads:
                returned = variant.module(*example)
                for slot, item in zip(variant.writes, returned[results:], strict=True):
                    caches |= {slot: item, previous_of(slot): item}
        samples: dict[_Row, list[float]] = {name: [] for name in built}
        for _ in range(repetitions + _WARM_UP):
            for name, variant in built.items():
                inputs = [*example, *(caches.get(slot, unit) for slot in variant.reads)]
                samples[name].append(_seconds(partial(variant.module, *inputs)))
    return {name: min(taken[_WARM_UP:]) for name, taken in samples.items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
