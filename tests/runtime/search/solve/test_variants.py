"""A cap on step variants is kept, and costs as little as it must."""

from __future__ import annotations

import itertools

import pytest

from ditfastattn import Strategy
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.search.solve import variants
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.runtime.search.solve.variants import (
    cap_variants,
    capped_within_budget,
    merged_plans,
)
from tests.runtime.search.solve.test_budget import problem

MULTIPLIER = 4.0


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_cap_is_kept_and_a_looser_one_is_no_worse(seed: int, most: int) -> None:
    case = problem(seed, sites=4, steps=10)
    free = solve(case, MULTIPLIER)

    def value(rows: list[Row]) -> float:
        return case.costs.plan(rows, merge_variants=True) + MULTIPLIER * case.drift(rows)

    capped = cap_variants(case, free, most, MULTIPLIER)
    looser = cap_variants(case, free, most + 3, MULTIPLIER)
    assert len(set(capped)) <= most < len(set(free))
    assert set(capped[0]) == {Strategy.FULL}
    assert value(capped) >= value(looser) - 1e-9
    dense: list[Row] = [(Strategy.FULL,) * 4] * 10
    assert value(capped) <= value(dense) + 1e-9
    if most == 1:
        assert capped == dense


@pytest.mark.parametrize("seed", range(4))
def test_two_variants_are_near_the_best_two(seed: int) -> None:
    case = problem(seed, sites=1, steps=6)

    def value(rows: list[Row]) -> float:
        return case.costs.plan(rows, merge_variants=True) + MULTIPLIER * case.drift(rows)

    full: Row = (Strategy.FULL,)
    best = min(
        value([full, *rest])
        for other in strategies()
        for rest in itertools.product([full, (other,)], repeat=5)
    )
    found = value(cap_variants(case, solve(case, MULTIPLIER), 2, MULTIPLIER))
    dense = value([full] * 6)
    assert found <= dense
    assert dense - found >= 0.7 * (dense - best)


def test_a_plan_within_the_cap_is_left_alone() -> None:
    case = problem(0, sites=2, steps=6)
    free = solve(case, MULTIPLIER)
    assert cap_variants(case, free, len(set(free)), MULTIPLIER) == free


@pytest.mark.parametrize("most", [2, 3, 4])
def test_a_capped_plan_uses_its_budget(most: int) -> None:
    case = problem(1, sites=4, steps=10)
    budget = 0.5 * case.drift(solve(case, 0.0))
    rows = capped_within_budget(case, budget, most)
    free = within_budget(case, budget)
    assert len(set(rows)) <= most < len(set(free))
    assert case.drift(rows) <= budget
    gained, possible = case.speedup(rows, True) - 1.0, case.speedup(free) - 1.0
    assert gained > (0.3 if most == 2 else 0.5) * possible


@pytest.mark.parametrize("seed", range(3))
def test_a_looser_cap_is_never_slower(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[float, dict[int, list[Row]]] = {}

    def merged(case: Problem, rows: list[Row], multiplier: float) -> dict[int, list[Row]]:
        """Merge once per multiplier: each cap asks for the same ones, and for some more."""
        if multiplier not in known:
            known[multiplier] = merged_plans(case, rows, multiplier)
        return known[multiplier]

    monkeypatch.setattr(variants, "merged_plans", merged)
    case = problem(seed, sites=4, steps=10)
    budget = 0.3 * case.drift(solve(case, 0.0))
    speedups = [
        case.speedup(capped_within_budget(case, budget, most), True) for most in range(1, 9)
    ]
    assert speedups == sorted(speedups)
    assert speedups[0] == 1.0 < speedups[1] < speedups[-1]
