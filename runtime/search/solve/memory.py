"""Keep the caches of a plan within a bound of bytes.

Strategies that need caches are forbidden in two stages: first extrapolation, which keeps several
outputs of a site instead of one, then all of them. In each stage the sites that save least time per
byte come first, until the rest fits. The plan is chosen again under these restrictions, so that the
budget of drift is spent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.solve.problem import Array, Problem
from ditfastattn.runtime.search.solve.rows import Row

Choose = Callable[[Problem], list[Row]]


def extrapolates(strategy: Strategy) -> bool:
    """Return whether ``strategy`` keeps several outputs of a site instead of one."""
    return strategy.extrapolates


def needs_caches(strategy: Strategy) -> bool:
    """Return whether ``strategy`` reads a cache of any kind."""
    return strategy.windowed or not strategy.computes


def within_memory(
    problem: Problem, choose: Choose, cache_bytes: Callable[[Sequence[Row]], int], most: int
) -> list[Row]:
    """Return the plan that ``choose`` makes, with at most ``most`` bytes of caches.

    How much is forbidden is found by bisection.
    """
    rows = choose(problem)
    if cache_bytes(rows) <= most:
        return rows
    order = _by_worth(problem, rows, cache_bytes)

    def restricted(count: int) -> Problem:
        extrapolating, cached = order[:count], order[: max(0, count - len(order))]
        return forbid(forbid(problem, extrapolates, extrapolating), needs_caches, cached)

    low, high = 0, 2 * len(order)  # ``low`` restrictions are too few, ``high`` are enough
    found = choose(restricted(high))
    while high - low > 1:
        middle = (low + high) // 2
        rows = choose(restricted(middle))
        if cache_bytes(rows) <= most:
            found, high = rows, middle
        else:
            low = middle
    return found


def forbid(problem: Problem, which: Callable[[Strategy], bool], sites: Sequence[int]) -> Problem:
    """Forbid ``sites`` the strategies for which ``which`` holds."""

    def change(strategy: Strategy, errors: Array) -> Array:
        if not which(strategy):
            return errors
        changed = errors.copy()
        changed[..., list(sites)] = np.inf
        return changed

    return replace(problem, errors=problem.errors.apply(change))


def _by_worth(
    problem: Problem, rows: Sequence[Row], cache_bytes: Callable[[Sequence[Row]], int]
) -> list[int]:
    """Return the sites ordered by what they save per byte, the least first."""
    columns = list(zip(*rows, strict=True))
    full = (Strategy.FULL,) * len(rows)
    worth: list[float] = []
    for site, column in enumerate(columns):
        alone = [full] * len(columns)
        alone[site] = column
        bytes_ = cache_bytes(list(zip(*alone, strict=True)))
        prices = problem.costs.sites[site]
        saved = sum(prices[Strategy.FULL] - prices[strategy] for strategy in column)
        worth.append(saved / bytes_ if bytes_ else np.inf)
    return [int(site) for site in np.argsort(worth, kind="stable")]
