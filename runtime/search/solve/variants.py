"""Cap the number of distinct step variants of a plan, choosing strategies and variants together.

Each variant is a compiled graph, or an engine, and costs memory and compile time. Starting from the
unconstrained plan, the two kinds of step whose union costs least are merged, repeatedly. After each
merge every entry of every kind of step is reconsidered for all its steps at once. Plans are valued
by ``price + multiplier * drift``, as in ``solve``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.rows import Row

_PAIRS = 64  # merges tried at once: the pairs of rows that differ least
_SWEEPS = 3
_BISECTIONS = 8


def capped_within_budget(problem: Problem, budget: float, most: int) -> list[Row]:
    """Return the cheapest plan found of at most ``most`` distinct rows and drift ``budget``.

    The exchange rate between drift and price is bisected for each number of rows up to ``most``, so
    that a looser cap never finds a worse plan; a rate that comes up again costs nothing.
    """
    best: list[Row] = [(Strategy.FULL,) * problem.errors.sites] * problem.errors.steps
    rate = problem.costs.step * problem.errors.steps / budget
    known: dict[float, dict[int, list[Row]]] = {}
    for count in range(2, most + 1):
        low, high = np.log(1e-4), np.log(1e4)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            if middle not in known:
                multiplier = rate * float(np.exp(middle))
                known[middle] = merged_plans(problem, solve(problem, multiplier), multiplier)
            rows = known[middle].get(count) or known[middle][max(known[middle])]
            if problem.drift(rows) > budget:
                low = middle
                continue
            high = middle
            if problem.costs.plan(rows, True) < problem.costs.plan(best, True):
                best = rows
    return best


def cap_variants(problem: Problem, rows: Sequence[Row], most: int, multiplier: float) -> list[Row]:
    """Return a plan like ``rows`` with at most ``most`` distinct rows; step 0 stays full."""
    plans = merged_plans(problem, rows, multiplier)
    return plans[max(count for count in plans if count <= most)]


def merged_plans(problem: Problem, rows: Sequence[Row], multiplier: float) -> dict[int, list[Row]]:
    """Return plans like ``rows``, by their number of distinct rows, down to 1: the dense plan."""
    kinds = list(dict.fromkeys(rows))
    clusters = [[step for step, row in enumerate(rows) if row == kind] for kind in kinds]
    judge = _Judge(problem, multiplier)
    found = {len(kinds): _spread(kinds, clusters)}
    while len(kinds) > 1:
        _, first, second, kind = min(
            _merges(judge, kinds, clusters), key=lambda candidate: candidate[0]
        )
        clusters[first] = sorted(clusters[first] + clusters[second])
        kinds[first] = kind
        del clusters[second], kinds[second]
        _improve(judge, kinds, clusters)
        found[len(kinds)] = _spread(kinds, clusters)
    return found


class _Judge:
    """Value plans, remembering each site's drift by its column."""

    def __init__(self, problem: Problem, multiplier: float) -> None:
        self.problem = problem
        self._multiplier = multiplier
        self._drift: dict[tuple[int, Row], float] = {}

    def value(self, rows: Sequence[Row]) -> float:
        """Return price plus weighed drift; infinite where the plan is not legal."""
        drift = 0.0
        for site, column in enumerate(zip(*rows, strict=True)):
            key = (site, column)
            if key not in self._drift:
                self._drift[key] = self.problem.column_drift(site, column)
            drift += self._drift[key]
        price = self.problem.costs.plan(rows, merge_variants=True)
        return price + self._multiplier * drift


def _merges(
    judge: _Judge, kinds: Sequence[Row], clusters: Sequence[Sequence[int]]
) -> list[tuple[float, int, int, Row]]:
    """Value merging the pairs of kinds that are most alike, under either's strategies."""
    pairs = sorted(
        combinations(range(len(kinds)), 2),
        key=lambda pair: sum(a != b for a, b in zip(kinds[pair[0]], kinds[pair[1]], strict=True)),
    )
    found: list[tuple[float, int, int, Row]] = []
    for first, second in pairs[:_PAIRS]:
        for kept in (first, second):
            if 0 in clusters[first] and kept == second:
                continue  # step 0 computes everything
            trial = list(kinds)
            trial[first] = trial[second] = kinds[kept]
            value = judge.value(_spread(trial, clusters))
            found.append((value, first, second, kinds[kept]))
    return found


def _improve(judge: _Judge, kinds: list[Row], clusters: Sequence[Sequence[int]]) -> None:
    """Change single entries of the kinds, in place, as long as that improves the plan."""
    best = judge.value(_spread(kinds, clusters))
    for _ in range(_SWEEPS):
        before = best
        for index, kind in enumerate(kinds):
            if 0 in clusters[index]:
                continue
            for site in range(len(kind)):
                best = _improve_entry(judge, kinds, clusters, index, site, best)
        if best == before:
            return


def _improve_entry(
    judge: _Judge,
    kinds: list[Row],
    clusters: Sequence[Sequence[int]],
    index: int,
    site: int,
    best: float,
) -> float:
    for strategy in strategies():
        kind = kinds[index]
        trial = list(kinds)
        trial[index] = (*kind[:site], strategy, *kind[site + 1 :])
        value = judge.value(_spread(trial, clusters))
        if value < best:
            kinds[index], best = trial[index], value
    return best


def _spread(kinds: Sequence[Row], clusters: Sequence[Sequence[int]]) -> list[Row]:
    """Return the plan's rows by step."""
    rows: dict[int, Row] = {}
    for kind, steps in zip(kinds, clusters, strict=True):
        rows |= dict.fromkeys(steps, kind)
    return [rows[step] for step in range(len(rows))]
