"""The solver finds what trying every plan finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from ditfastattn import Strategy
from ditfastattn.passes.plan.strategies import STRATEGIES, strategies
from ditfastattn.runtime.search.measure.error_table import MAX_GAP
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem
from tests.error_tables import GAP_PAIRS, of, table_of

STEPS = 5


def problem(seed: int, sites: int = 2, steps: int = STEPS, guided: bool = True) -> Problem:
    """Return random errors, weights and prices, in the order that real ones have."""
    random = np.random.default_rng(seed)
    future = np.triu(np.ones((steps, steps), dtype=bool))

    def cached(scale: float) -> np.ndarray:
        errors = scale * random.random((steps, steps, sites))
        errors[future] = np.inf
        return errors

    share_cfg = random.random((steps, sites)) if guided else np.full((steps, sites), np.inf)
    window_share_cfg = cached(1.2) if guided else np.full((steps, steps, sites), np.inf)
    lines = 0.8 * random.random((steps, steps, MAX_GAP + 1, sites))
    lines[future] = lines[:, :, 0] = np.inf
    parabolas = 0.5 * random.random((steps, steps, len(GAP_PAIRS), sites))
    parabolas[future] = np.inf
    errors = table_of(
        share_step=cached(1.0),
        window=cached(0.3),
        window_share_cfg=window_share_cfg,
        share_cfg=share_cfg,
        extrapolate=lines,
        extrapolate_quadratic=parabolas,
        share_cfg_refresh=share_cfg.copy(),
    )
    of(errors, "window")[:, steps:] *= 1.5  # the conditional half's residual for both
    for name in ("window", "window_share_cfg", "share_cfg_refresh"):
        of(errors, name)[..., 1:2] = np.inf  # the second site is a feed-forward
    prices = tuple(
        {
            Strategy.FULL: 3.0 + random.random(),
            Strategy.WINDOW: 1.5 + random.random(),
            Strategy.SHARE_STEP: 0.0,
            Strategy.EXTRAPOLATE: 0.3 * random.random(),
            Strategy.EXTRAPOLATE_QUADRATIC: 0.4 * random.random(),
            Strategy.SHARE_CFG: 1.5 + random.random() if guided else np.inf,
            Strategy.WINDOW_SHARE_CFG: 0.7 + random.random() if guided else np.inf,
            Strategy.SHARE_CFG_REFRESH: 2.0 + random.random() if guided else np.inf,
        }
        for _ in range(sites)
    )
    costs = CostTable(10.0 * sites, prices, tuple(random.random(sites)))
    return Problem(errors, random.random((steps, sites)), costs)


REFRESH = Strategy.SHARE_CFG_REFRESH
KNOWN = [strategy for strategy in STRATEGIES if strategy != REFRESH]  # to the shortest paths


def best_by_trying(
    case: Problem, multiplier: float, site: int, strategies: Iterable[Strategy] = KNOWN
) -> float:
    """Return the least value of any column of one site."""
    full = (Strategy.FULL,) * case.errors.steps
    others = [full] * case.errors.sites
    found = np.inf
    for tail in itertools.product(strategies, repeat=case.errors.steps - 1):
        column = (Strategy.FULL, *tail)
        rows = list(zip(*[*others[:site], column, *others[site + 1 :]], strict=True))
        drift = case.column_drift(site, column)
        if np.isfinite(drift):
            found = min(found, case.costs.plan(rows) + multiplier * drift)
    return found


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("multiplier", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_plan_is_better(seed: int, multiplier: float, guided: bool) -> None:
    case = problem(seed, guided=guided)
    rows = solve(case, multiplier)
    dense = case.costs.step * STEPS
    value = case.costs.plan(rows) + multiplier * case.drift(rows)
    expected = sum(best_by_trying(case, multiplier, site) - dense for site in range(2)) + dense
    if REFRESH in {entry for row in rows for entry in row}:
        assert value < expected - 1e-9
    else:
        assert value == pytest.approx(expected, rel=1e-9)


def test_refreshing_is_taken_where_it_makes_a_plan_better() -> None:
    case = problem(0, sites=1, steps=8)
    ages = np.arange(8)[:, None] - np.arange(8)
    for strategy, errors in case.errors.by_strategy.items():
        errors[...] = np.inf if strategy.outputs_read else 0.02
        if strategy.windowed:  # what counts is the residual's age
            errors[...] = np.tile(np.where(ages > 0, 0.06 * ages, np.inf), 2)[:, :, None]
    price = {Strategy.FULL: 4.0, Strategy.SHARE_CFG: 2.5, REFRESH: 2.75}
    price |= {Strategy.WINDOW: 2.0, Strategy.WINDOW_SHARE_CFG: 1.0}
    costs = CostTable(10.0, ({**case.costs.sites[0], **price},), (0.1,))
    case = Problem(case.errors, np.ones((8, 1)), costs)

    def forbidden(strategy: Strategy, errors: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full_like(errors, np.inf) if strategy == REFRESH else errors

    without = Problem(case.errors.apply(forbidden), case.weights, case.costs)
    rows, plain = solve(case, 10.0), solve(without, 10.0)
    assert [str(row[0]) for row in rows[:4]] == ["full", *["window+share-cfg"] * 2, str(REFRESH)]
    assert REFRESH not in {entry for row in plain for entry in row}
    values = [case.costs.plan(each) + 10.0 * case.drift(each) for each in (rows, plain)]
    assert values[0] < values[1]


def test_a_window_is_charged_by_the_step_and_the_half_of_its_residual() -> None:
    case = problem(8, sites=1, steps=4)
    full, share, window = Strategy.FULL, Strategy.SHARE_CFG, Strategy.WINDOW
    errors, weights = case.errors, case.weights[:, 0]
    for strategy, source in ((share, 0), (REFRESH, 1 + 4)):
        expected = (
            of(errors, "share_cfg")[1, 0] * weights[1]
            + of(errors, "window")[2, source, 0] * weights[2]
        )
        assert case.column_drift(0, (full, strategy, window, full)) == pytest.approx(expected)


def curved(seed: int, sites: int, steps: int, guided: bool = False) -> Problem:
    """Return a problem where a parabola is mostly nearer than a line, and a line than a share."""
    case = problem(seed, sites, steps, guided)
    of(case.errors, "share_step")[...] += 1.0
    of(case.errors, "extrapolate")[...] += 0.5
    of(case.errors, "extrapolate_quadratic")[...] *= 0.2
    return case


@pytest.mark.parametrize("multiplier", [4.0, 10.0, 30.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_plan_with_parabolas_is_better(seed: int, multiplier: float) -> None:
    case = curved(seed, sites=2, steps=8)
    rows = solve(case, multiplier)
    assert Strategy.EXTRAPOLATE_QUADRATIC in {entry for row in rows for entry in row}
    value = case.costs.column(1, [row[1] for row in rows])
    value += multiplier * case.column_drift(1, [row[1] for row in rows])
    full = case.costs.column(1, [Strategy.FULL] * 8)
    reusing = [strategy for strategy in strategies() if strategy.outputs_read]
    best = best_by_trying(case, multiplier, 1, [Strategy.FULL, *reusing])
    assert value == pytest.approx(best - case.costs.step * 8 + full, rel=1e-9)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_parabolas_never_make_a_plan_dearer(seed: int, guided: bool) -> None:
    case = curved(seed, sites=3, steps=9, guided=guided)
    without = case.reading_at_most(2)
    better = 0
    for multiplier in (0.5, 2.0, 8.0, 30.0):
        values = [
            each.costs.plan(rows) + multiplier * each.drift(rows)
            for each in (case, without)
            for rows in [solve(each, multiplier)]
        ]
        assert values[0] <= values[1] + 1e-9
        better += values[0] < values[1] - 1e-6
    assert better
    most = case.drift(solve(case, 0.0))
    for share in (0.1, 0.4):
        rows, plain = (within_budget(each, share * most) for each in (case, without))
        assert case.costs.plan(rows) <= without.costs.plan(plain)
        assert not {entry for row in plain for entry in row} & {Strategy.EXTRAPOLATE_QUADRATIC}


def test_the_budget_is_kept_and_used() -> None:
    case = problem(3, sites=6, steps=12)
    cheapest = case.drift(solve(case, 0.0))
    speedups = []
    for share in (0.0, 0.05, 0.2, 0.5, 1.0):
        rows = within_budget(case, share * cheapest)
        assert case.drift(rows) <= share * cheapest
        speedups.append(case.speedup(rows))
    assert speedups == sorted(speedups)
    assert speedups[0] == 1.0
    assert speedups[-1] == pytest.approx(case.speedup(solve(case, 0.0)))
    assert case.drift(within_budget(case, 0.2 * cheapest)) > 0.15 * cheapest


def test_step_zero_is_full_and_errors_early_or_late_weigh_as_given() -> None:
    case = problem(4, sites=3, steps=10)
    weights = np.ones((10, 3))
    weights[7:] = 1e6  # the last steps must not be touched
    late = Problem(case.errors, weights, case.costs)
    rows = within_budget(late, 1.0)
    assert set(rows[0]) == {Strategy.FULL}
    assert {entry for row in rows[7:] for entry in row} == {Strategy.FULL}
    assert {entry for row in rows[:7] for entry in row} != {Strategy.FULL}


def test_a_shared_output_carries_the_error_of_the_step_that_computed_it() -> None:
    case = problem(5, sites=1, steps=3)
    window, share = Strategy.WINDOW, Strategy.SHARE_STEP
    errors = case.errors
    expected = (
        of(errors, "window")[1, 0, 0] * case.weights[1, 0]
        + (of(errors, "share_step")[2, 1, 0] + of(errors, "window")[1, 0, 0]) * case.weights[2, 0]
    )
    assert case.column_drift(0, (Strategy.FULL, window, share)) == pytest.approx(expected)
    assert case.column_drift(0, (share, window, share)) == np.inf


def test_a_line_needs_two_outputs_and_carries_their_error_further() -> None:
    case = problem(6, sites=1, steps=4)
    full, window, line = Strategy.FULL, Strategy.WINDOW, Strategy.EXTRAPOLATE
    assert case.column_drift(0, (full, line, full, full)) == np.inf
    errors, inherited = case.errors, of(case.errors, "window")[2, 0, 0]
    expected = (
        inherited * case.weights[2, 0]
        + (of(errors, "extrapolate")[3, 2, 2, 0] + 1.5 * inherited) * case.weights[3, 0]
    )
    shared = of(errors, "share_step")[1, 0, 0] * case.weights[1, 0]
    column = (full, Strategy.SHARE_STEP, window, line)
    assert case.column_drift(0, column) == pytest.approx(shared + expected)


def test_a_parabola_needs_three_outputs_evenly_apart() -> None:
    case = problem(7, sites=1, steps=7)
    full, window, curve = Strategy.FULL, Strategy.WINDOW, Strategy.EXTRAPOLATE_QUADRATIC
    share, line = Strategy.SHARE_STEP, Strategy.EXTRAPOLATE
    assert case.column_drift(0, (full, full, curve, *[full] * 4)) == np.inf
    assert case.column_drift(0, (full, share, full, full, curve, full, full)) == np.inf
    errors, weights = case.errors, case.weights[:, 0]
    inherited, parabola = of(errors, "window")[4, 0, 0], of(errors, "extrapolate_quadratic")
    expected = (
        of(errors, "share_step")[1, 0, 0] * weights[1]
        + of(errors, "window")[2, 0, 0] * weights[2]
        + (of(errors, "extrapolate")[3, 2, 2, 0] + 1.5 * of(errors, "window")[2, 0, 0]) * weights[3]
        + inherited * weights[4]
        + (parabola[5, 4, GAP_PAIRS.index((2, 2)), 0] + 1.875 * inherited) * weights[5]
    )
    column = (full, share, window, line, window, curve, full)
    assert case.column_drift(0, column) == pytest.approx(expected)
