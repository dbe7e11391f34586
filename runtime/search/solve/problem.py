"""State what a search knows: errors, weights and prices of every strategy at every site and step.

The drift of a plan is the sum, over all steps and sites, of each shortcut's error times its weight,
the root of the damage it does to the image: the errors of a plan mostly point the same way, so
amplitudes add up, and the damage goes with the square of the drift (measured on the demo model:
within a quarter, over a factor of eight in damage; adding energies ranks plans worse at every
speed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.measure.error_table import ErrorTable
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.solve.rows import Row

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Hold what a search knows: errors, weights ``[T, M]``, and prices."""

    errors: ErrorTable
    weights: Array
    costs: CostTable

    def drift(self, rows: Sequence[Row]) -> float:
        """Return the drift of a plan."""
        columns = zip(*rows, strict=True)
        return sum(self.column_drift(index, column) for index, column in enumerate(columns))

    def column_drift(self, site: int, column: Sequence[Strategy]) -> float:
        """Return one site's share; infinite if it reads a cache that no step wrote."""
        inherited = total = 0.0  # a reused output carries the error of the step that computed it
        for step, strategy, source, gaps in reads(column):
            error = self.errors.of(strategy, step, source, site, gaps)
            if strategy.computes:
                inherited = error
            else:  # extrapolation amplifies it
                used = gaps[: strategy.outputs_read - 1]
                error += inherited * carried(strategy, step - source, used)
            total += error * float(self.weights[step, site])
        return total

    def reading_at_most(self, outputs: int) -> Problem:
        """Return the same problem where nothing is made of more than ``outputs`` outputs."""

        def forbid(strategy: Strategy, errors: Array) -> Array:
            return np.full_like(errors, np.inf) if strategy.outputs_read > outputs else errors

        return replace(self, errors=self.errors.apply(forbid))

    def speedup(self, rows: Sequence[Row], merge_variants: bool = False) -> float:
        """Return the dense price over the plan's."""
        return self.costs.speedup(rows, merge_variants)


def reads(column: Sequence[Strategy]) -> Iterator[tuple[int, Strategy, int, tuple[int, ...]]]:
    """Yield each step of a site with its strategy, and what that reads.

    That is the step that stored the residual or computed the output last, and the gaps between the
    outputs before it, the latest first. The residual of a step that shares guidance counts from the
    number of steps on, as in an ``ErrorTable``.
    """
    output = residual = 0
    gaps: tuple[int, ...] = (0,) * most_outputs_read()
    for step, strategy in enumerate(column):
        yield step, strategy, residual if strategy.computes else output, gaps
        if strategy.computes:
            gaps, output = (step - output, *gaps[:-1]), step
        if strategy.refreshes_residual:
            residual = step + len(column) * strategy.shares_guidance


@cache
def carried(strategy: Strategy, elapsed: int, gaps: tuple[int, ...]) -> float:
    """Return the weight of the last output in what is reused ``elapsed`` steps after it."""
    return abs(strategy.weights(elapsed, gaps)[0]) if all(gaps) else 1.0


def most_outputs_read() -> int:
    """Return how many earlier outputs a strategy of the table reads at most."""
    return max(strategy.outputs_read for strategy in strategies())
