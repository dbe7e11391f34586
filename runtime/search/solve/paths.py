"""Find the plan of least ``price + multiplier * drift``: a shortest path per site.

A site's shortcut reads caches that an earlier step of the *same* site wrote, so sites are
independent, and each is a shortest path from one step that computes something to the next, the
steps between reusing its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.measure.error_table import MAX_GAP, gap_choices
from ditfastattn.runtime.search.solve.problem import Array, Problem, carried
from ditfastattn.runtime.search.solve.rows import Row

_FULL = 0  # the first kind of ``_kinds``
_LINE, _PARABOLA = 2, 3  # outputs read


@dataclass(frozen=True)
class _Kind:
    """Say what a step computes, and whether a residual has been stored (and paid for) by then."""

    strategy: Strategy
    stored: bool


def _kinds() -> tuple[_Kind, ...]:
    """Return what a step can compute: ``FULL``, then kinds without and with a stored residual."""
    shortcuts = [s for s in strategies() if s.computes and s != Strategy.FULL]
    plain = [strategy for strategy in shortcuts if not strategy.windowed]
    windowed = [strategy for strategy in shortcuts if strategy.windowed]
    return (
        _Kind(Strategy.FULL, False),
        *(_Kind(strategy, False) for strategy in plain),
        *(_Kind(strategy, True) for strategy in (*plain, *windowed)),
    )


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
            columns |= {int(site): paths.column(index) for index, site in enumerate(sites)}
    return [tuple(row) for row in zip(*(columns[site] for site in sorted(columns)), strict=True)]


class _Paths:
    """Find the shortest paths of ``sites``, of which all or none have windows.

    A node is (step that computes, step of the residual, gaps, what it computes); where there are no
    windows the second is always 0. The gaps are those before the step: one, as a line needs it, 0
    where it is too wide; or two, as a parabola needs it. Before a node of one gap there may be any.
    ``standing`` is ``[M, T, R, G, K]``: what it costs to have computed there, in each of K kinds,
    and to have reused the output ever since. Strategies that read more than three outputs are not
    considered.
    """

    def __init__(
        self, problem: Problem, multiplier: float, sites: NDArray[np.int64], windowed: bool
    ) -> None:
        errors, steps = problem.errors, problem.errors.steps
        self._multiplier, self._windowed, self._steps = multiplier, windowed, steps
        self._errors = errors.apply(lambda _, each: each[..., sites])
        self._kinds = _kinds()
        self._unstored = slice(0, sum(not kind.stored for kind in self._kinds))
        self._stored = slice(self._unstored.stop, None)
        self._reusing = [s for s in strategies() if 0 < s.outputs_read <= _PARABOLA]
        self._weights = problem.weights[:, sites]
        self._price = {
            strategy: np.array([problem.costs.sites[site][strategy] for site in sites])
            for strategy in strategies()
        }
        self._storing = np.array([problem.costs.residual[site] for site in sites])
        self._lines = min(MAX_GAP, max(1, steps - 1)) + 1
        self._pairs = self._legal_pairs()
        self._gaps: list[tuple[int, ...]] = [(gap,) for gap in range(self._lines)]
        self._gaps += [gap_choices(_PARABOLA)[pair] for pair in self._pairs]
        self._shape = (steps, steps if windowed else 1, len(self._gaps), len(self._kinds))
        self._standing = np.full((len(sites), *self._shape), np.inf)
        self._inherited = np.zeros((len(sites), *self._shape[:2], 1, len(self._kinds)))
        self._origin = np.zeros(self._standing.shape, dtype=np.int64)
        self._standing[:, 0, 0, 0, _FULL] = self._price[Strategy.FULL]
        for step in range(1, steps):
            self._arrive(step)
            self._reuse(step)
        self._last = self._standing.reshape(len(sites), -1).argmin(axis=1)

    def _legal_pairs(self) -> list[int]:
        """Return which choices of two gaps some site may take."""
        tables = [self._errors.by_strategy[s] for s in self._reusing if s.outputs_read == _PARABOLA]
        return [
            index
            for index, pair in enumerate(gap_choices(_PARABOLA))
            if sum(pair) < self._steps
            and any(np.isfinite(table[:, :, index]).any() for table in tables)
        ]

    def _residuals(self, step: int) -> slice:
        """Return those residuals that nodes before ``step`` can have."""
        return slice(0, step if self._windowed else 1)

    def _reuse(self, step: int) -> None:
        """Reuse at ``step`` what each node has computed, as is cheapest."""
        lines, pairs = self._gaps[: self._lines], self._gaps[self._lines :]
        shape = (len(self._standing), step, self._residuals(step).stop, 1, len(self._kinds))
        known = np.full((*shape[:3], len(lines), shape[4]), np.inf)
        curved = np.full((*shape[:3], len(pairs), shape[4]), np.inf)
        for strategy in self._reusing:
            error = self._errors.by_strategy[strategy][step, :step]
            if strategy.outputs_read < _LINE:
                known = np.minimum(known, self._following(strategy, step, error, [()]))
            elif strategy.outputs_read == _LINE:
                error = error[:, : self._lines]
                known = np.minimum(known, self._following(strategy, step, error, lines))
            else:
                error = error[:, self._pairs]
                curved = np.minimum(curved, self._following(strategy, step, error, pairs))
        curved = np.minimum(known[:, :, :, [gaps[0] for gaps in pairs]], curved)
        standing = self._standing[:, :step, self._residuals(step)]
        standing[:, :, :, : self._lines] += known
        standing[:, :, :, self._lines :] += curved

    def _following(
        self, strategy: Strategy, step: int, error: Array, gaps: Sequence[tuple[int, ...]]
    ) -> Array:
        """Return what ``strategy`` costs at ``step``, ``[M, step, residuals, len(gaps), K]``.

        That is by its own ``error``, ``[step, len(gaps), M]``, and by what it carries further.
        """
        weight = self._multiplier * self._weights[step][:, None, None]
        own = error.transpose(2, 0, 1)
        legal = np.isfinite(own)
        known = self._price[strategy][:, None, None] + weight * np.where(legal, own, 0.0)
        carrying = weight * _carried_by(strategy, step, tuple(gaps))
        inherited = self._inherited[:, :step, self._residuals(step)]
        cost: Array = carrying[:, :, None, :, None] * inherited
        cost += np.where(legal, known, np.inf)[:, :, None, :, None]
        return cost

    def _arrive(self, step: int) -> None:
        """Fill in the nodes that compute at ``step``."""
        unstored, from_unstored = self._reach(step, self._unstored)
        if not self._windowed:
            self._compute_kinds(step, False, unstored, from_unstored)
            self._compute_full(step, unstored, from_unstored)
            return
        stored, from_stored = self._reach(step, self._stored)
        reach = np.concatenate([unstored, stored], axis=1)
        self._compute_kinds(step, False, unstored, from_unstored)
        self._compute_full(step, reach, np.concatenate([from_unstored, from_stored], axis=1))
        with_storing = unstored + self._storing[:, None, None]
        cheaper = with_storing < stored
        ready = np.where(cheaper, with_storing, stored)
        from_ready = np.where(cheaper, from_unstored, from_stored)
        self._compute_kinds(step, True, stored, from_stored)
        self._compute_kinds(step, True, ready, from_ready, windowed=True)

    def _compute_kinds(
        self, step: int, stored: bool, value: Array, origin: Array, windowed: bool = False
    ) -> None:
        """Fill in the shortcuts that compute at ``step``, arriving with ``value``."""
        for index, kind in enumerate(self._kinds[1:], 1):
            if (kind.stored, kind.strategy.windowed) != (stored, windowed):
                continue
            errors = self._errors.by_strategy[kind.strategy][step]
            error = errors.T if windowed else np.broadcast_to(errors[:, None], value.shape[:2])
            self._compute(step, index, value, origin, error)

    def _compute_full(self, step: int, reach: Array, nodes: Array) -> None:
        """Compute everything at ``step``, whatever the residual was before."""
        best = reach.argmin(axis=1)[:, None]
        least, origin = (np.take_along_axis(each, best, axis=1)[:, 0] for each in (reach, nodes))
        full = (slice(None), step, step if self._windowed else 0, slice(None), _FULL)
        self._standing[full] = least + self._price[Strategy.FULL][:, None]
        self._origin[full] = origin

    def _compute(self, step: int, kind: int, value: Array, origin: Array, error: Array) -> None:
        weight = self._multiplier * self._weights[step][:, None]
        legal = np.isfinite(error)
        known = np.where(legal, error, 0.0)
        price = self._price[self._kinds[kind].strategy][:, None]
        cost = np.where(legal, np.where(legal, price, 0.0) + weight * known, np.inf)
        self._standing[:, step, :, :, kind] = value + cost[:, :, None]
        self._inherited[:, step, :, 0, kind] = known
        self._origin[:, step, :, :, kind] = origin

    def _reach(self, step: int, kinds: slice) -> tuple[Array, Array]:
        """Return what it costs to arrive at ``step`` from nodes of ``kinds``: ``[M, R, G]``.

        That is per site, residual and gaps before ``step``; and the flat nodes it is from.
        """
        shape = len(self._standing), *self._shape[1:3]
        values: Array = np.full(shape, np.inf)
        nodes: Any = np.zeros(shape, dtype=np.int64)
        for index, (gap, *before) in enumerate(self._gaps):
            earlier = slice(step - gap, step - gap + 1) if gap else slice(0, step - self._lines + 1)
            held = [i for i, each in enumerate(self._gaps) if not before or each[0] == before[0]]
            if earlier.start >= 0 and earlier.start < earlier.stop:
                cheapest = self._cheapest(kinds, earlier, held)
                known = self._residuals(earlier.stop)
                values[:, known, index], nodes[:, known, index] = cheapest
        return values, nodes

    def _cheapest(self, kinds: slice, earlier: slice, held: list[int]) -> tuple[Array, Array]:
        """Return per site and residual ``[M, R]`` the least value, and the flat node it is of."""
        chosen = self._standing[:, earlier, self._residuals(earlier.stop), :, kinds]
        if len(held) < len(self._gaps):
            chosen = chosen[:, :, :, held]
        sites, steps, residuals, gaps, width = chosen.shape
        flat = chosen.transpose(0, 2, 1, 3, 4).reshape(sites, residuals, -1)
        best = flat.argmin(axis=2)
        step, gap, kind = np.unravel_index(best, (steps, gaps, width))
        row = np.broadcast_to(np.arange(residuals), step.shape)
        place = step + earlier.start, row, np.array(held)[gap], kind + kinds.start
        node: Any = np.ravel_multi_index(place, self._shape)
        return flat.min(axis=2), node

    def column(self, index: int) -> list[Strategy]:
        """Return the strategies of the ``index``-th site, traced back from the end."""
        found = [Strategy.SHARE_STEP] * self._steps
        node, end = int(self._last[index]), self._steps
        while True:
            step, residual, gaps, kind = map(int, np.unravel_index(node, self._shape))
            found[step] = self._kinds[kind].strategy
            inherited = float(self._inherited[index, step, residual, 0, kind])
            for later in range(step + 1, end):
                costs = {
                    strategy: self._cost(strategy, index, later, step, self._gaps[gaps], inherited)
                    for strategy in self._reusing
                }
                found[later] = min(costs, key=lambda strategy: costs[strategy])
            if step == 0:
                return found
            node, end = int(self._origin[index, step, residual, gaps, kind]), step

    def _cost(
        self,
        strategy: Strategy,
        site: int,
        step: int,
        source: int,
        gaps: tuple[int, ...],
        inherited: float,
    ) -> float:
        """Return what it costs one site to follow at ``step`` from its node at ``source``."""
        error = self._errors.of(strategy, step, source, site, gaps)
        if math.isinf(error):
            return math.inf
        carrying = carried(strategy, step - source, gaps[: strategy.outputs_read - 1])
        weight = self._multiplier * float(self._weights[step, site])
        return float(self._price[strategy][site]) + weight * (error + carrying * inherited)


@cache
def _carried_by(strategy: Strategy, step: int, gaps: tuple[tuple[int, ...], ...]) -> Array:
    """Return what is carried to ``step`` from each step before it, ``[step, len(gaps)]``."""
    sources = range(step)
    return np.array([[carried(strategy, step - s, each) for each in gaps] for s in sources])
