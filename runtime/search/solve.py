"""Choose every strategy of a plan at once, under one budget of drift of the final image.

The drift is the sum, over all steps and sites, of each shortcut's error times its weight, the root
of the damage it does to the image: the errors of a plan mostly point the same way, so amplitudes
add up, and the damage goes with the square of the drift (measured on the demo model: within a
quarter, over a factor of eight in damage; adding energies ranks plans worse at every speed).

Minimize ``price + multiplier * drift``. A site's shortcut reads caches
that an earlier step of the *same* site wrote, so sites are independent, and each is a shortest path
from one step that computes something to the next, the steps between sharing its output. The
multiplier is the exchange rate between drift and price; ``within_budget`` turns it until the drift
just fits, which gives the plans on the convex hull of the trade-off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan import Strategy
from ditfastattn.runtime.search.latency import CostTable
from ditfastattn.runtime.search.profile import MAX_GAP, ErrorTable

Array = NDArray[np.float64]
Row = tuple[Strategy, ...]

_BISECTIONS = 30


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
        output = residual = gap = 0
        inherited = total = 0.0  # a reused output carries the error of the step that computed it
        for step, strategy in enumerate(column):
            source = residual if strategy.computes else output
            error = self.errors.of(strategy, step, source, site, gap)
            if strategy is Strategy.SHARE_STEP:
                error += inherited
            elif strategy is Strategy.EXTRAPOLATE:  # a line carries it further
                error += inherited * (1.0 + (step - output) / max(gap, 1))
            else:
                gap, output, inherited = step - output, step, error
            if strategy is Strategy.FULL:
                residual = step
            total += error * float(self.weights[step, site])
        return total

    def speedup(self, rows: Sequence[Row], merge_variants: bool = False) -> float:
        """Return the dense price over the plan's."""
        return self.costs.speedup(rows, merge_variants)


def within_budget(problem: Problem, budget: float) -> list[Row]:
    """Return a cheap plan whose drift is at most ``budget``.

    The cheapest on the hull that fits; what it leaves of the budget goes to the sites whose column
    of the next plan on the hull fits still, in the order of what a unit of drift saves there.
    """
    dense: list[Row] = [(Strategy.FULL,) * problem.errors.sites] * problem.errors.steps
    if budget <= 0.0:
        return dense
    rate = problem.costs.step * problem.errors.steps / budget  # the natural exchange rate
    low, high = np.log(1e-8), np.log(1e8)
    best, beyond = dense, dense
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        rows = solve(problem, rate * float(np.exp(middle)))
        if problem.drift(rows) <= budget:
            best, high = rows, middle
        else:
            beyond, low = rows, middle
    return _filled(problem, best, beyond, budget)


def _filled(problem: Problem, rows: list[Row], beyond: list[Row], budget: float) -> list[Row]:
    """Take over columns of the plan ``beyond`` the budget, as long as the drift fits."""
    columns, others = list(zip(*rows, strict=True)), list(zip(*beyond, strict=True))

    def saved(site: int) -> float:
        trial = [*columns[:site], others[site], *columns[site + 1 :]]
        return problem.costs.plan(rows) - problem.costs.plan(list(zip(*trial, strict=True)))

    left = budget - problem.drift(rows)
    more = {
        site: problem.column_drift(site, others[site]) - problem.column_drift(site, columns[site])
        for site in range(len(columns))
        if others[site] != columns[site]
    }
    for site in sorted(more, key=lambda index: -saved(index) / max(more[index], 1e-30)):
        if more[site] <= left and saved(site) > 0.0:
            columns[site], left = others[site], left - more[site]
    return list(zip(*columns, strict=True))


# What a step can compute, and whether the residual it may read has been stored (and paid for).
_FULL, _CFG, _CFG_STORED, _WINDOW, _WINDOW_CFG = range(5)
_STRATEGY = (
    Strategy.FULL,
    Strategy.SHARE_CFG,
    Strategy.SHARE_CFG,
    Strategy.WINDOW,
    Strategy.WINDOW_SHARE_CFG,
)
_UNSTORED = slice(_FULL, _CFG_STORED)
_STORED = slice(_CFG_STORED, None)


def solve(problem: Problem, multiplier: float) -> list[Row]:
    """Return the plan of least ``price + multiplier * drift``; step 0 is full."""
    windowed = np.isfinite(problem.errors.window).any(axis=(0, 1))
    windowed |= np.isfinite(problem.errors.window_share_cfg).any(axis=(0, 1))
    columns: dict[int, list[Strategy]] = {}
    for has_window in (False, True):
        sites = np.flatnonzero(windowed == has_window)
        if len(sites):
            paths = _Paths(problem, multiplier, sites, has_window)
            columns |= {int(site): paths.column(index) for index, site in enumerate(sites)}
    return [tuple(row) for row in zip(*(columns[site] for site in sorted(columns)), strict=True)]


class _Paths:
    """Find the shortest paths of ``sites``, of which all or none have windows.

    A node is (step that computes, step of the residual, gap to the step that computed before, what
    it computes); where there are no windows the second is always 0, and a gap of 0 is one too wide
    to extrapolate over. ``standing`` is ``[M, T, R, G, 5]``: what it costs to have computed there,
    and to have reused the output ever since.
    """

    def __init__(
        self, problem: Problem, multiplier: float, sites: NDArray[np.int64], windowed: bool
    ) -> None:
        errors, steps = problem.errors, problem.errors.steps
        self._multiplier, self._windowed, self._steps = multiplier, windowed, steps
        self._errors = ErrorTable(
            *(getattr(errors, field.name)[..., sites] for field in fields(errors))
        )
        self._weights = problem.weights[:, sites]
        self._price = {
            strategy: np.array([problem.costs.sites[site][strategy] for site in sites])
            for strategy in Strategy
        }
        self._storing = np.array([problem.costs.residual[site] for site in sites])
        gaps = min(MAX_GAP, max(1, steps - 1)) + 1
        self._shape = (steps, steps if windowed else 1, gaps, len(_STRATEGY))
        self._standing = np.full((len(sites), *self._shape), np.inf)
        self._inherited = np.zeros((len(sites), *self._shape[:2], 1, len(_STRATEGY)))
        self._origin = np.zeros(self._standing.shape, dtype=np.int64)
        self._standing[:, 0, 0, 0, _FULL] = self._price[Strategy.FULL]
        for step in range(1, steps):
            self._arrive(step)
            self._standing[:, :step] += self._reuse(step, np.arange(step)).min(axis=0)
        self._last = self._standing.reshape(len(sites), -1).argmin(axis=1)

    def _reuse(self, step: int, sources: NDArray[np.int64]) -> Array:
        """Return what it costs at ``step`` to share, and to extrapolate, from each node.

        ``[2, M, len(sources), R, G, 5]``.
        """
        gaps = np.arange(self._shape[2])
        inherited = self._inherited[:, sources]
        far = (step - sources)[:, None] / np.maximum(gaps, 1)
        shared = self._errors.share_step[step, sources].T[:, :, None, None, None]
        line = self._errors.extrapolate[step, sources][:, gaps].transpose(2, 0, 1)
        both = np.stack(
            [
                np.broadcast_to(shared + inherited, (*inherited.shape[:3], len(gaps), 5)),
                line[:, :, None, :, None] + (1.0 + far)[:, None, :, None] * inherited,
            ]
        )
        price = np.stack([self._price[Strategy.SHARE_STEP], self._price[Strategy.EXTRAPOLATE]])
        weight = self._multiplier * self._weights[step]
        legal = np.isfinite(both)
        cost = price[:, :, None, None, None, None] + weight[:, None, None, None, None] * np.where(
            legal, both, 0.0
        )
        return np.where(legal, cost, np.inf)

    def _arrive(self, step: int) -> None:
        """Fill in the nodes that compute at ``step``, by the gap to the step before."""
        for gap in range(self._shape[2]):
            first = max(0, step - gap) if gap else 0
            last = step - gap + 1 if gap else max(0, step - self._shape[2] + 1)
            if step >= gap and first < last:
                self._arrive_from(step, gap, slice(first, last))

    def _arrive_from(self, step: int, gap: int, earlier: slice) -> None:
        reach = self._standing[:, earlier]
        start = earlier.start
        flat = reach.reshape(len(reach), -1)
        residual = step if self._windowed else 0
        best = flat.argmin(axis=1) + start * int(np.prod(self._shape[1:]))
        full = (slice(None), step, residual, gap, _FULL)
        self._standing[full] = flat.min(axis=1) + self._price[Strategy.FULL]
        self._origin[full] = best
        unstored, from_unstored = self._cheapest(reach, _UNSTORED, start)
        cfg = np.broadcast_to(self._errors.share_cfg[step][:, None], unstored.shape)
        self._compute(step, gap, _CFG, unstored, from_unstored, cfg)
        if not self._windowed:
            return
        stored, from_stored = self._cheapest(reach, _STORED, start)
        with_storing = unstored + self._storing[:, None]
        cheaper = with_storing < stored
        ready = np.where(cheaper, with_storing, stored)
        from_ready = np.where(cheaper, from_unstored, from_stored)
        both = self._errors.window_share_cfg[step].T
        self._compute(step, gap, _CFG_STORED, stored, from_stored, cfg)
        self._compute(step, gap, _WINDOW, ready, from_ready, self._errors.window[step].T)
        self._compute(step, gap, _WINDOW_CFG, ready, from_ready, both)

    def _compute(
        self, step: int, gap: int, kind: int, value: Array, origin: Array, error: Array
    ) -> None:
        weight = self._multiplier * self._weights[step][:, None]
        legal = np.isfinite(error)
        known = np.where(legal, error, 0.0)
        price = self._price[_STRATEGY[kind]][:, None]
        cost = np.where(legal, price, 0.0) + weight * known
        self._standing[:, step, :, gap, kind] = np.where(legal, value + cost, np.inf)
        self._inherited[:, step, :, 0, kind] = known
        self._origin[:, step, :, gap, kind] = origin

    def _cheapest(self, reach: Array, kinds: slice, start: int) -> tuple[Array, Array]:
        """Return per site and residual ``[M, R]`` the least value, and the flat node it is of."""
        sites, steps, residuals, gaps, count = reach.shape
        offset = kinds.indices(count)[0]
        chosen = reach[..., kinds]
        width = chosen.shape[4]
        flat = chosen.transpose(0, 2, 1, 3, 4).reshape(sites, residuals, -1)
        best = flat.argmin(axis=2)
        step, gap, kind = np.unravel_index(best, (steps, gaps, width))
        row = np.broadcast_to(np.arange(residuals), step.shape)
        node: Any = np.ravel_multi_index((step + start, row, gap, kind + offset), self._shape)
        return flat.min(axis=2), node

    def column(self, index: int) -> list[Strategy]:
        """Return the strategies of the ``index``-th site, traced back from the end."""
        found = [Strategy.SHARE_STEP] * self._steps
        node, end = int(self._last[index]), self._steps
        while True:
            step, residual, gap, kind = map(int, np.unravel_index(node, self._shape))
            found[step] = _STRATEGY[kind]
            for later in range(step + 1, end):
                share, line = self._reuse(later, np.array([step]))[:, index, 0, residual, gap, kind]
                found[later] = Strategy.EXTRAPOLATE if line < share else Strategy.SHARE_STEP
            if step == 0:
                return found
            node, end = int(self._origin[index, step, residual, gap, kind]), step
