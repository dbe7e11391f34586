"""Let steps that share guidance refresh the residual, where the windows after them gain by it.

The shortest paths of ``paths.py`` know the residuals of full steps alone: twice as many nodes would
be needed for both kinds. So their columns are improved afterwards, entry by entry, which never
makes one worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.solve.problem import Problem


def refreshed(
    problem: Problem, multiplier: float, site: int, column: Sequence[Strategy]
) -> list[Strategy]:
    """Return ``column``, or one of less ``price + multiplier * drift`` that refreshes at a step.

    Of what computes in full or shares guidance, one step after the other is tried.
    """
    best = list(column)
    refreshing = [each for each in strategies() if each.refreshes_residual and each.needs_window]
    if not any(strategy.windowed for strategy in column):
        return best

    def value(trial: Sequence[Strategy]) -> float:
        drift = problem.column_drift(site, trial)
        return problem.costs.column(site, trial) + multiplier * drift

    least = value(best)
    for step, strategy in enumerate(column):
        if step == 0 or not strategy.computes or strategy.windowed:
            continue
        for each in refreshing:
            if not np.isfinite(problem.errors.by_strategy[each][step, site]):
                continue
            trial = [*best[:step], each, *best[step + 1 :]]
            found = value(trial)
            if found < least:
                best, least = trial, found
    return best
