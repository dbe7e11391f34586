"""Keep the caches of a plan within a bound of bytes.

Sites are taken their caches away, those first that save least time per byte, until the rest fits;
the plan is chosen anew for what they may still do, so that the budget of drift is spent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from ditfastattn.passes.plan import Strategy
from ditfastattn.runtime.search.solve import Problem, Row

Choose = Callable[[Problem], list[Row]]


def within_memory(
    problem: Problem, choose: Choose, cache_bytes: Callable[[Sequence[Row]], int], most: int
) -> list[Row]:
    """Return what ``choose`` chooses, with at most ``most`` bytes of caches.

    The number of sites without caches is found by bisection.
    """
    rows = choose(problem)
    if cache_bytes(rows) <= most:
        return rows
    order = _by_worth(problem, rows, cache_bytes)
    low, high = 0, len(order)  # ``low`` sites without caches are too few, ``high`` are enough
    found = choose(without_caches(problem, order))
    while high - low > 1:
        middle = (low + high) // 2
        rows = choose(without_caches(problem, order[:middle]))
        if cache_bytes(rows) <= most:
            found, high = rows, middle
        else:
            low = middle
    return found


def without_caches(problem: Problem, sites: Sequence[int]) -> Problem:
    """Forbid ``sites`` what reads a cache; they may still share guidance."""
    errors = problem.errors
    tables = {}
    for field in fields(errors):
        if field.name != "share_cfg":
            tables[field.name] = getattr(errors, field.name).copy()
            tables[field.name][..., list(sites)] = np.inf
    return replace(problem, errors=replace(errors, **tables))


def _by_worth(
    problem: Problem, rows: Sequence[Row], cache_bytes: Callable[[Sequence[Row]], int]
) -> list[int]:
    """Return the sites in the order of what they save per byte, the least first."""
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
