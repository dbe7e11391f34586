"""Keep the caches of a plan within a bound of bytes.

Sites are forbidden what needs caches, rung by rung: first extrapolation, which keeps several
outputs of a site in place of one, then every cache. On each rung those sites come first that save
least time per byte, until the rest fits; the plan is chosen anew for what they may still do, so
that the budget of drift is spent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from ditfastattn.passes.plan.schema import Strategy
from ditfastattn.runtime.search.measure.profile import ErrorTable
from ditfastattn.runtime.search.solve.problem import Problem, Row

Choose = Callable[[Problem], list[Row]]

EXTRAPOLATION = ("extrapolate", "extrapolate_quadratic")  # tables of errors, by strategy
CACHES = tuple(field.name for field in fields(ErrorTable) if field.name != "share_cfg")


def within_memory(
    problem: Problem, choose: Choose, cache_bytes: Callable[[Sequence[Row]], int], most: int
) -> list[Row]:
    """Return what ``choose`` chooses, with at most ``most`` bytes of caches.

    How much is forbidden is found by bisection.
    """
    rows = choose(problem)
    if cache_bytes(rows) <= most:
        return rows
    order = _by_worth(problem, rows, cache_bytes)

    def restricted(count: int) -> Problem:
        extrapolating, cached = order[:count], order[: max(0, count - len(order))]
        return forbid(forbid(problem, EXTRAPOLATION, extrapolating), CACHES, cached)

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


def forbid(problem: Problem, tables: Sequence[str], sites: Sequence[int]) -> Problem:
    """Forbid ``sites`` the strategies of ``tables``, those of errors."""
    made = {}
    for name in tables:
        made[name] = getattr(problem.errors, name).copy()
        made[name][..., list(sites)] = np.inf
    return replace(problem, errors=replace(problem.errors, **made))


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
