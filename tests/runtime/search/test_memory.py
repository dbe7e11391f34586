"""A bound on the bytes of caches is kept, at the least cost in speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditfastattn import Strategy
from ditfastattn.runtime.search.memory import within_memory, without_caches
from ditfastattn.runtime.search.solve import Problem, Row, within_budget
from tests.runtime.search.test_solve import problem

BYTES = (1, 2, 4, 8, 16, 32)


def cache_bytes(rows: Sequence[Row]) -> int:
    """Count a site's bytes where it ever reads a cache."""
    columns = zip(*rows, strict=True)
    cacheless = {Strategy.FULL, Strategy.SHARE_CFG}
    used = [not cacheless.issuperset(column) for column in columns]
    return sum(size for size, use in zip(BYTES, used, strict=True) if use)


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


def test_a_site_without_caches_still_shares_guidance() -> None:
    case = problem(8, sites=3)
    bare = without_caches(case, [1])
    assert np.isinf(bare.errors.share_step[..., 1]).all()
    assert np.isinf(bare.errors.extrapolate[..., 1]).all()
    assert np.isinf(bare.errors.extrapolate_quadratic[..., 1]).all()
    assert np.isfinite(bare.errors.share_cfg).all()
    assert np.isfinite(bare.errors.share_step[2, 0, [0, 2]]).all()
    assert np.isfinite(case.errors.share_step[2, 0, 1])  # the problem itself is left alone
