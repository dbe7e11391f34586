"""What sites do at the steps that run is the best of all that they could do there."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ditfastattn import Strategy
from ditfastattn.passes.plan.strategies import STRATEGIES
from ditfastattn.runtime.search.solve.at_steps import at_steps, idle_when_skipped
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem
from tests.runtime.search.solve.test_budget import STEPS, problem

RUNS = (0, 2, 3)


def best_by_trying(case: Problem, multiplier: float, site: int) -> float:
    """Return the least value of any column of one site that computes at ``RUNS`` alone.

    The second skipped step follows the last run, the first one step 0.
    """
    weights = case.weights.copy()
    weights[0] += weights[1]
    weights[3] += weights[4]
    weights[[1, 4]] = 0.0
    weighed = replace(case, weights=weights)
    found = np.inf
    for second, third in itertools.product(STRATEGIES, repeat=2):
        column = (Strategy.FULL, Strategy.SHARE_STEP, second, third, Strategy.SHARE_STEP)
        drift = weighed.column_drift(site, column)
        prices = case.costs.sites[site]
        idle = 2 * prices[Strategy.SHARE_STEP]
        price = case.costs.column(site, column) - idle - len(RUNS) * prices[Strategy.FULL]
        if np.isfinite(drift):
            found = min(found, price + multiplier * drift)
    return found


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_plan_of_these_steps_is_better(seed: int, multiplier: float) -> None:
    case = problem(seed)
    restricted = at_steps(case, RUNS)
    rows = idle_when_skipped(restricted, solve(restricted, multiplier))
    assert all(rows[step] == (Strategy.SHARE_STEP,) * 2 for step in (1, 4))
    value = restricted.costs.plan(rows) + multiplier * restricted.drift(rows)
    expected = sum(best_by_trying(case, multiplier, site) for site in range(2))
    assert value == pytest.approx(case.costs.step * len(RUNS) + expected, rel=1e-9)


def test_steps_that_do_not_run_cost_nothing() -> None:
    restricted = at_steps(problem(0), RUNS)
    rows = idle_when_skipped(restricted, within_budget(restricted, 0.0))
    assert restricted.speedup(rows) == pytest.approx(STEPS / len(RUNS))
    assert restricted.drift(rows) == 0.0


def test_all_steps_are_the_problem_itself() -> None:
    case = problem(1)
    assert within_budget(at_steps(case, range(STEPS)), 2.0) == within_budget(case, 2.0)
