"""State what a search knows: errors, weights and prices of every strategy at every site and step.

The drift of a plan is the sum, over all steps and sites, of each shortcut's error times its weight,
the root of the damage it does to the image: the errors of a plan mostly point the same way, so
amplitudes add up, and the damage goes with the square of the drift (measured on the demo model:
within a quarter, over a factor of eight in damage; adding energies ranks plans worse at every
speed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.schema import Strategy
from ditfastattn.passes.rewrites.extrapolate_steps import output_weights
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.measure.profile import ErrorTable

Array = NDArray[np.float64]
Row = tuple[Strategy, ...]


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
        """Return one site's share; infinite where a cache is read that nobody wrote."""
        output = residual = 0
        gaps = (0, 0)  # between the last two outputs, and between the two before
        inherited = total = 0.0  # a reused output carries the error of the step that computed it
        for step, strategy in enumerate(column):
            source = residual if strategy.computes else output
            error = self.errors.of(strategy, step, source, site, gaps)
            if strategy.computes:
                gaps, output, inherited = (step - output, gaps[0]), step, error
            else:  # a curve carries it further
                error += inherited * carried(step - output, gaps[: strategy.outputs_needed - 1])
            if strategy is Strategy.FULL:
                residual = step
            total += error * float(self.weights[step, site])
        return total

    def without_parabolas(self) -> Problem:
        """Return the same problem where nothing extrapolates from three outputs."""
        never = np.full_like(self.errors.extrapolate_quadratic, np.inf)
        return replace(self, errors=replace(self.errors, extrapolate_quadratic=never))

    def speedup(self, rows: Sequence[Row], merge_variants: bool = False) -> float:
        """Return the dense price over the plan's."""
        return self.costs.speedup(rows, merge_variants)


@cache
def carried(elapsed: int, gaps: tuple[int, ...]) -> float:
    """Return the weight of the last output in what is reused ``elapsed`` steps after it."""
    return output_weights(elapsed, gaps)[0]
