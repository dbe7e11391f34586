"""Choose what sites do at the steps that run, where the others are skipped as a whole.

A site that is idle repeats its last output, which nothing reads: that is free and changes nothing.
What it reads at a step that runs was computed at one. What a step changes, it changes in the
skipped steps after it too, whose outputs are made of its own; so it answers for them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure.error_table import gap_choices
from ditfastattn.runtime.search.solve.problem import Array, Problem
from ditfastattn.runtime.search.solve.rows import Row


def at_steps(problem: Problem, runs: Collection[int]) -> Problem:
    """Return ``problem`` where only the steps ``runs`` run; the first step is one of them."""
    steps = problem.errors.steps
    skipped = sorted(set(range(steps)) - set(runs))

    def change(strategy: Strategy, errors: Array) -> Array:
        changed = errors.copy()
        changed[skipped] = np.inf
        if strategy.outputs_read:
            for place, gaps in enumerate(gap_choices(strategy.outputs_read)):
                changed[:, _reading(skipped, gaps, steps), place] = np.inf
        elif strategy.windowed:
            changed[:, [*skipped, *(steps + step for step in skipped)]] = np.inf
        if strategy is Strategy.SHARE_STEP:
            for step in skipped:
                changed[step, :step] = 0.0
        return changed

    weights = problem.weights.copy()
    for step in skipped:
        weights[max(run for run in runs if run < step)] += weights[step]
        weights[step] = 0.0
    costs = replace(problem.costs, skipped=frozenset(skipped))
    return replace(problem, errors=problem.errors.apply(change), weights=weights, costs=costs)


def idle_when_skipped(problem: Problem, rows: Sequence[Row]) -> list[Row]:
    """Return ``rows`` with every site idle where ``problem`` skips the step."""
    idle = (Strategy.SHARE_STEP,) * problem.errors.sites
    return [idle if step in problem.costs.skipped else row for step, row in enumerate(rows)]


def _reading(skipped: Sequence[int], gaps: Sequence[int], steps: int) -> list[int]:
    """Return the steps of last outputs where one that is ``gaps`` before them was skipped."""
    distances = list(accumulate((0, *gaps)))
    return [step for step in range(steps) if any(step - each in skipped for each in distances)]
