"""A bound on the bytes of caches is kept, at the least cost in speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.memory import (
    extrapolates,
    forbid,
    needs_caches,
    within_memory,
)
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.rows import Row
from tests.error_tables import of
from tests.runtime.search.solve.test_budget import problem

BYTES = (1, 2, 4, 8, 16, 32)


def cache_bytes(rows: Sequence[Row]) -> int:
    """Count a site's bytes once for each output that it keeps at a time, or a residual."""
    total = 0
    for size, column in zip(BYTES, zip(*rows, strict=True), strict=True):
        windowed = any(strategy.windowed for strategy in column)
        total += size * (max(strategy.outputs_read for strategy in column) + windowed)
    return total


def choose(case: Problem) -> list[Row]:
    return within_budget(case, 2.0)


def test_every_bound_is_kept_and_more_memory_is_never_slower() -> None:
    case = problem(7, sites=6, steps=8)
    unbound = within_memory(case, choose, cache_bytes, 1000)
    assert unbound == choose(case)
    assert cache_bytes(unbound) > 32
    speedups = []
    for most in (0, 8, 20, 40, 63):
        rows = within_memory(case, choose, cache_bytes, most)
        assert cache_bytes(rows) <= most
        assert case.drift(rows) <= 2.0
        speedups.append(case.speedup(rows))
    assert speedups == sorted(speedups)
    assert speedups[0] > 1.0  # guidance can still be shared
    assert speedups[-1] > speedups[0]


def test_extrapolation_is_given_up_before_caches_are() -> None:
    case = problem(7, sites=6, steps=8)
    free = choose(case)
    curved = [any(s.extrapolates for s in column) for column in zip(*free, strict=True)]
    assert sum(curved) > 1
    rows = within_memory(case, choose, cache_bytes, cache_bytes(free) - 1)
    columns = list(zip(*rows, strict=True))
    assert all(any(not s.computes or s.windowed for s in column) for column in columns)
    assert sum(any(s.extrapolates for s in column) for column in columns) < sum(curved)
    none = forbid(case, extrapolates, range(6))
    assert not any(s.extrapolates for row in choose(none) for s in row)


def test_a_site_without_caches_still_shares_guidance() -> None:
    case = problem(8, sites=3)
    bare = forbid(case, needs_caches, [1])
    assert np.isinf(of(bare.errors, "share_step")[..., 1]).all()
    assert np.isinf(of(bare.errors, "extrapolate")[..., 1]).all()
    assert np.isinf(of(bare.errors, "extrapolate_quadratic")[..., 1]).all()
    assert np.isfinite(of(bare.errors, "share_cfg")).all()
    assert np.isfinite(of(bare.errors, "share_step")[2, 0, [0, 2]]).all()
    assert np.isfinite(of(case.errors, "share_step")[2, 0, 1])  # the problem itself is left alone
