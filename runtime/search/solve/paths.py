"""Find the plan of least ``price + multiplier * drift``: a shortest path per site.

A site's shortcut reads caches that an earlier step of the *same* site wrote, so sites are
independent, and each is a shortest path from one step that computes something to the next, the
steps between reusing its output. Residuals are of full steps here; ``refresh.py`` adds others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.solve.path_costs import PathCosts
from ditfastattn.runtime.search.solve.path_nodes import FULL, LINE, nodes_of, reusing
from ditfastattn.runtime.search.solve.problem import Array, Problem
from ditfastattn.runtime.search.solve.refresh import refreshed
from ditfastattn.runtime.search.solve.rows import Row


def solve(problem: Problem, multiplier: float) -> list[Row]:
    """Return the plan of least ``price + multiplier * drift``; step 0 is full."""
    windowed = np.zeros(problem.errors.sites, dtype=bool)
    for strategy, errors in problem.errors.by_strategy.items():
        if strategy.windowed:
            windowed |= np.isfinite(errors).any(axis=(0, 1))
    columns: dict[int, list[Strategy]] = {}
    for has_window in (False, True):
        sites = np.flatnonzero(windowed == has_window)
        if len(sites):
            paths = _Paths(problem, multiplier, sites, has_window)
            for index, site in enumerate(map(int, sites)):
                column = paths.column(index)
                columns[site] = refreshed(problem, multiplier, site, column)
    return [tuple(row) for row in zip(*(columns[site] for site in sorted(columns)), strict=True)]


class _Paths:
    """Find the shortest paths of ``sites``, of which all or none have windows.

    ``standing`` is ``[M, T, R, G, K]``: what it costs each of M sites to have computed at a node,
    and to have reused the output ever since. ``inherited`` is the error that such an output
    carries, and ``origin`` the node before on the cheapest path, as a flat index.
    """

    def __init__(
        self, problem: Problem, multiplier: float, sites: NDArray[np.int64], windowed: bool
    ) -> None:
        self._costs = PathCosts(problem, multiplier, sites)
        self._nodes = nodes_of(self._costs.errors, windowed)
        self._reusing = reusing()
        shape = (len(sites), *self._nodes.shape)
        self._standing = np.full(shape, np.inf)
        self._inherited = np.zeros((*shape[:3], 1, shape[4]))
        self._origin = np.zeros(shape, dtype=np.int64)
        self._standing[:, 0, 0, 0, FULL] = self._costs.price[Strategy.FULL]
        for step in range(1, self._nodes.steps):
            self._arrive(step)
            self._reuse(step)
        self._last = self._standing.reshape(len(sites), -1).argmin(axis=1)

    def _reuse(self, step: int) -> None:
        """Reuse at ``step`` what each node has computed, as is cheapest."""
        nodes, residuals = self._nodes, self._nodes.residuals(step)
        lines, pairs = nodes.gaps[: nodes.lines], nodes.gaps[nodes.lines :]
        inherited = self._inherited[:, :step, residuals]
        shape = (len(inherited), step, residuals.stop)
        known = np.full((*shape, len(lines), len(nodes.kinds)), np.inf)
        curved = np.full((*shape, len(pairs), len(nodes.kinds)), np.inf)
        for strategy in self._reusing:
            error = self._costs.errors.by_strategy[strategy][step, :step]
            gaps: Sequence[tuple[int, ...]] = [()]
            if strategy.outputs_read == LINE:
                error, gaps = error[:, : nodes.lines], lines
            elif strategy.outputs_read > LINE:
                error, gaps = error[:, list(nodes.pairs)], pairs
            cost = self._costs.reusing(strategy, step, error, gaps, inherited)
            if strategy.outputs_read > LINE:
                curved = np.minimum(curved, cost)
            else:
                known = np.minimum(known, cost)
        curved = np.minimum(known[:, :, :, [gaps[0] for gaps in pairs]], curved)
        standing = self._standing[:, :step, residuals]
        standing[:, :, :, : nodes.lines] += known
        standing[:, :, :, nodes.lines :] += curved

    def _arrive(self, step: int) -> None:
        """Fill in the nodes that compute at ``step``."""
        unstored, from_unstored = self._reach(step, self._nodes.unstored)
        if not self._nodes.windowed:
            self._compute_kinds(step, False, unstored, from_unstored)
            self._compute_full(step, unstored, from_unstored)
            return
        stored, from_stored = self._reach(step, self._nodes.stored)
        reach = np.concatenate([unstored, stored], axis=1)
        self._compute_kinds(step, False, unstored, from_unstored)
        self._compute_full(step, reach, np.concatenate([from_unstored, from_stored], axis=1))
        with_storing = unstored + self._costs.storing[:, None, None]
        cheaper = with_storing < stored
        ready = np.where(cheaper, with_storing, stored)
        from_ready = np.where(cheaper, from_unstored, from_stored)
        self._compute_kinds(step, True, stored, from_stored)
        self._compute_kinds(step, True, ready, from_ready, windowed=True)

    def _compute_kinds(
        self, step: int, stored: bool, value: Array, origin: Array, windowed: bool = False
    ) -> None:
        """Fill in the shortcuts that compute at ``step``, arriving with ``value``."""
        for index, kind in enumerate(self._nodes.kinds[1:], 1):
            if (kind.stored, kind.strategy.windowed) != (stored, windowed):
                continue
            errors = self._costs.errors.by_strategy[kind.strategy][step]
            of_full = errors[: self._nodes.steps]
            error = of_full.T if windowed else np.broadcast_to(errors[:, None], value.shape[:2])
            self._compute(step, index, value, origin, error)

    def _compute_full(self, step: int, reach: Array, nodes: Array) -> None:
        """Compute everything at ``step``, whatever the residual was before."""
        best = reach.argmin(axis=1)[:, None]
        least, origin = (np.take_along_axis(each, best, axis=1)[:, 0] for each in (reach, nodes))
        full = (slice(None), step, step if self._nodes.windowed else 0, slice(None), FULL)
        self._standing[full] = least + self._costs.price[Strategy.FULL][:, None]
        self._origin[full] = origin

    def _compute(self, step: int, kind: int, value: Array, origin: Array, error: Array) -> None:
        cost = self._costs.computing(self._nodes.kinds[kind].strategy, step, error)
        self._standing[:, step, :, :, kind] = value + cost[:, :, None]
        self._inherited[:, step, :, 0, kind] = np.where(np.isfinite(error), error, 0.0)
        self._origin[:, step, :, :, kind] = origin

    def _reach(self, step: int, kinds: slice) -> tuple[Array, Array]:
        """Return what it costs to arrive at ``step`` from nodes of ``kinds``: ``[M, R, G]``.

        That is per site, residual and gaps before ``step``; and the flat nodes it is from.
        """
        shape = len(self._standing), *self._nodes.shape[1:3]
        values: Array = np.full(shape, np.inf)
        nodes: Any = np.zeros(shape, dtype=np.int64)
        for index, gaps in enumerate(self._nodes.gaps):
            earlier, held = self._nodes.before(step, gaps)
            if earlier.start >= 0 and earlier.start < earlier.stop:
                cheapest = self._cheapest(kinds, earlier, held)
                known = self._nodes.residuals(earlier.stop)
                values[:, known, index], nodes[:, known, index] = cheapest
        return values, nodes

    def _cheapest(self, kinds: slice, earlier: slice, held: list[int]) -> tuple[Array, Array]:
        """Return per site and residual ``[M, R]`` the least value, and the flat node it is of."""
        chosen = self._standing[:, earlier, self._nodes.residuals(earlier.stop), :, kinds]
        if len(held) < len(self._nodes.gaps):
            chosen = chosen[:, :, :, held]
        sites, steps, residuals, gaps, width = chosen.shape
        flat = chosen.transpose(0, 2, 1, 3, 4).reshape(sites, residuals, -1)
        best = flat.argmin(axis=2)
        step, gap, kind = np.unravel_index(best, (steps, gaps, width))
        row = np.broadcast_to(np.arange(residuals), step.shape)
        place = step + earlier.start, row, np.array(held)[gap], kind + kinds.start
        node: Any = np.ravel_multi_index(place, self._nodes.shape)
        return flat.min(axis=2), node

    def column(self, index: int) -> list[Strategy]:
        """Return the strategies of the ``index``-th site, traced back from the end."""
        found = [Strategy.SHARE_STEP] * self._nodes.steps
        node, end = int(self._last[index]), self._nodes.steps
        while True:
            step, residual, gaps, kind = map(int, np.unravel_index(node, self._nodes.shape))
            found[step] = self._nodes.kinds[kind].strategy
            inherited = float(self._inherited[index, step, residual, 0, kind])
            for later in range(step + 1, end):
                costs = {
                    strategy: self._costs.reusing_at(
                        strategy, index, later, step, self._nodes.gaps[gaps], inherited
                    )
                    for strategy in self._reusing
                }
                found[later] = min(costs, key=lambda strategy: costs[strategy])
            if step == 0:
                return found
            node, end = int(self._origin[index, step, residual, gaps, kind]), step
