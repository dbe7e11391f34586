"""Choose every strategy of a plan at once, under one budget of drift of the final image.

Minimizing ``price + multiplier * drift`` is a shortest path per site. The multiplier is the
exchange rate between drift and price; it gives the plans on the convex hull of the trade-off, and
``within_budget`` finds the two of them between which the budget lies.
"""

from __future__ import annotations

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.rows import Row

_MOST_RATES = 60  # tried; about ten are enough
_ON_HULL = 1e-9  # relative difference that rounding may make between equal plans


def within_budget(problem: Problem, budget: float) -> list[Row]:
    """Return a cheap plan whose drift is at most ``budget``.

    It never costs more than the plan without parabolas.
    """
    plans = [_on_hull(each, budget) for each in (problem, problem.reading_at_most(2))]
    return min(plans, key=problem.costs.plan)


def _on_hull(problem: Problem, budget: float) -> list[Row]:
    """Return the cheapest plan on the hull that fits, with what it leaves of the budget spent.

    That goes to the sites whose column in the next plan on the hull still fits, those that save
    most per unit of drift first. Two plans are neighbours on the hull if no plan is better at the
    rate at which both are equally good.
    """
    best: list[Row] = [(Strategy.FULL,) * problem.errors.sites] * problem.errors.steps
    if budget <= 0.0:
        return best
    natural = problem.costs.step * problem.errors.steps / budget
    beyond = solve(problem, _ON_HULL * natural)  # of plans as cheap the one of least drift
    if problem.drift(beyond) <= budget:
        return beyond
    for _ in range(_MOST_RATES):
        drift, price = problem.drift(best), problem.costs.plan(best)
        rate = (price - problem.costs.plan(beyond)) / (problem.drift(beyond) - drift)
        rows = solve(problem, rate)
        value = problem.costs.plan(rows) + rate * problem.drift(rows)
        if value >= (price + rate * drift) * (1.0 - _ON_HULL):
            break
        if problem.drift(rows) <= budget:
            best = rows
        else:
            beyond = rows
    return _filled(problem, best, beyond, budget)


def _filled(problem: Problem, rows: list[Row], beyond: list[Row], budget: float) -> list[Row]:
    """Take over columns of the plan ``beyond`` the budget, as long as the drift fits."""
    columns, others = list(zip(*rows, strict=True)), list(zip(*beyond, strict=True))

    def saved(site: int) -> float:
        trial = [*columns[:site], others[site], *columns[site + 1 :]]
        return problem.costs.plan(rows) - problem.costs.plan(list(zip(*trial, strict=True)))

    left = budget - problem.drift(rows)
    more = {
        site: problem.column_drift(site, others[site]) - problem.column_drift(site, columns[site])
        for site in range(len(columns))
        if others[site] != columns[site]
    }
    for site in sorted(more, key=lambda index: -saved(index) / max(more[index], 1e-30)):
        if more[site] <= left and saved(site) > 0.0:
            columns[site], left = others[site], left - more[site]
    return list(zip(*columns, strict=True))
