"""What it costs sites to compute or to reuse at a step: ``price + multiplier * drift``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.solve.problem import Array, Problem, carried


class PathCosts:
    """Weigh what ``sites`` do at a step, by its price and the drift that it makes.

    Arrays of costs begin with the sites, ``M`` of them.
    """

    def __init__(self, problem: Problem, multiplier: float, sites: NDArray[np.int64]) -> None:
        """Take the rate between the two."""
        self.errors = problem.errors.apply(lambda _, each: each[..., sites])
        #: what a site's residual costs that is stored, ``[M]``
        self.storing = np.array([problem.costs.residual[site] for site in sites])
        #: what a site's strategy costs, ``[M]``
        self.price = {
            strategy: np.array([problem.costs.sites[site][strategy] for site in sites])
            for strategy in strategies()
        }
        self._weights = multiplier * problem.weights[:, sites]

    def computing(self, strategy: Strategy, step: int, error: Array) -> Array:
        """Return what it costs to compute a shortcut at ``step`` by its ``error``, ``[M, R]``."""
        weight = self._weights[step][:, None]
        legal = np.isfinite(error)
        price = np.where(legal, self.price[strategy][:, None], 0.0)
        return np.where(legal, price + weight * np.where(legal, error, 0.0), np.inf)

    def reusing(
        self,
        strategy: Strategy,
        step: int,
        error: Array,
        gaps: Sequence[tuple[int, ...]],
        inherited: Array,
    ) -> Array:
        """Return what ``strategy`` costs at ``step``, ``[M, step, residuals, len(gaps), K]``.

        That is by its own ``error``, ``[step, len(gaps), M]``, and by what it carries further of
        the ``inherited`` one.
        """
        weight = self._weights[step][:, None, None]
        own = error.transpose(2, 0, 1)
        legal = np.isfinite(own)
        known = self.price[strategy][:, None, None] + weight * np.where(legal, own, 0.0)
        carrying = weight * _carried_by(strategy, step, tuple(gaps))
        cost: Array = carrying[:, :, None, :, None] * inherited
        cost += np.where(legal, known, np.inf)[:, :, None, :, None]
        return cost

    def reusing_at(
        self,
        strategy: Strategy,
        site: int,
        step: int,
        source: int,
        gaps: tuple[int, ...],
        inherited: float,
    ) -> float:
        """Return what it costs one site to reuse at ``step`` what it computed at ``source``."""
        error = self.errors.of(strategy, step, source, site, gaps)
        if math.isinf(error):
            return math.inf
        carrying = carried(strategy, step - source, gaps[: strategy.outputs_read - 1])
        weight = float(self._weights[step, site])
        return float(self.price[strategy][site]) + weight * (error + carrying * inherited)


@cache
def _carried_by(strategy: Strategy, step: int, gaps: tuple[tuple[int, ...], ...]) -> Array:
    """Return what is carried to ``step`` from each step before it, ``[step, len(gaps)]``."""
    sources = range(step)
    return np.array([[carried(strategy, step - s, each) for each in gaps] for s in sources])
