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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan import Strategy
from ditfastattn.runtime.search.latency import CostTable
from ditfastattn.runtime.search.profile import ErrorTable

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
        output = residual = 0
        inherited = total = 0.0  # a shared output carries the error of the step that computed it
        for step, strategy in enumerate(column):
            source = output if strategy is Strategy.SHARE_STEP else residual
            error = self.errors.of(strategy, step, source, site)
            if strategy is Strategy.SHARE_STEP:
                error += inherited
            else:
                output, inherited = step, error
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
    path = _Paths(problem, multiplier)
    columns = [path.column(site) for site in range(problem.errors.sites)]
    return [tuple(row) for row in zip(*columns, strict=True)]


class _Paths:
    """Find the shortest paths of all sites.

    A node is (step that computes, step of the residual, what it computes); ``value`` and
    ``inherited`` are ``[M, T, T, 5]`` over them, ``origin`` the flat node that each came from.
    """

    def __init__(self, problem: Problem, multiplier: float) -> None:
        errors, steps, sites = problem.errors, problem.errors.steps, problem.errors.sites
        self._problem, self._multiplier = problem, multiplier
        self._price = {
            strategy: np.array([costs[strategy] for costs in problem.costs.sites])
            for strategy in Strategy
        }
        self._storing = np.array(problem.costs.residual)
        self._shape = (steps, steps, len(_STRATEGY))
        self._value = np.full((sites, *self._shape), np.inf)
        self._inherited = np.zeros_like(self._value)
        self._origin = np.zeros(self._value.shape, dtype=np.int64)
        self._value[:, 0, 0, _FULL] = self._price[Strategy.FULL]
        # Drift of sharing the output of step s from s + 1 up to (not including) t, [M, T, T + 1].
        shared = np.where(np.isfinite(errors.share_step), errors.share_step, 0.0)
        weighed = shared * problem.weights[:, None, :]
        self._run = _running(weighed.transpose(2, 1, 0))
        self._weight = _running(np.broadcast_to(problem.weights.T[:, None, :], self._run_shape))
        legal = np.isfinite(errors.share_step[1:, 0]).all(axis=0) if steps > 1 else np.ones(sites)
        self._may_share = legal.astype(bool)
        for step in range(1, steps):
            self._arrive(step)
        self._last = self._reach(steps).reshape(sites, -1).argmin(axis=1)

    @property
    def _run_shape(self) -> tuple[int, int, int]:
        sites, steps = self._value.shape[:2]
        return sites, steps, steps

    def _reach(self, step: int) -> Array:
        """Return the value of standing before ``step``, having shared since each node."""
        earlier = np.arange(step)
        between = (step - 1 - earlier)[None, :, None, None]
        each = np.where(self._may_share, self._price[Strategy.SHARE_STEP], 0.0)
        price = between * each[:, None, None, None]
        price = np.where((between > 0) & ~self._may_share[:, None, None, None], np.inf, price)
        gone = self._weight[:, earlier, step][:, :, None, None] * self._inherited[:, :step]
        drift = self._run[:, earlier, step][:, :, None, None] + gone
        reached: Array = self._value[:, :step] + price + self._multiplier * drift
        return reached

    def _arrive(self, step: int) -> None:
        """Fill in the nodes that compute at ``step``."""
        errors = self._problem.errors
        reach = self._reach(step)
        sites = len(reach)
        flat = reach.reshape(sites, -1)
        best = flat.argmin(axis=1)
        self._value[:, step, step, _FULL] = flat.min(axis=1) + self._price[Strategy.FULL]
        self._origin[:, step, step, _FULL] = best
        unstored, from_unstored = _cheapest(reach, _UNSTORED)
        stored, from_stored = _cheapest(reach, _STORED)
        with_storing = unstored + self._storing[:, None]
        cheaper = with_storing < stored
        ready = np.where(cheaper, with_storing, stored)
        from_ready = np.where(cheaper, from_unstored, from_stored)
        cfg = np.broadcast_to(errors.share_cfg[step][:, None], unstored.shape)
        self._compute(step, _CFG, unstored, from_unstored, cfg)
        self._compute(step, _CFG_STORED, stored, from_stored, cfg)
        self._compute(step, _WINDOW, ready, from_ready, errors.window[step].T)
        self._compute(step, _WINDOW_CFG, ready, from_ready, errors.window_share_cfg[step].T)

    def _compute(self, step: int, kind: int, value: Array, origin: Array, error: Array) -> None:
        weight = self._multiplier * self._problem.weights[step][:, None]
        legal = np.isfinite(error)
        known = np.where(legal, error, 0.0)
        price = self._price[_STRATEGY[kind]][:, None]
        self._value[:, step, :, kind] = np.where(legal, value + price + weight * known, np.inf)
        self._inherited[:, step, :, kind] = known
        self._origin[:, step, :, kind] = origin

    def column(self, site: int) -> list[Strategy]:
        """Return the strategies of one site, traced back from the end."""
        found = [Strategy.SHARE_STEP] * self._shape[0]
        node = int(self._last[site])
        while True:
            step, residual, kind = np.unravel_index(node, self._shape)
            found[step] = _STRATEGY[kind]
            if step == 0:
                return found
            node = int(self._origin[site, step, residual, kind])


def _running(weighed: Array) -> Array:
    """Sum ``[M, s, t]`` over the steps after ``s`` and before each ``t``: ``[M, T, T + 1]``."""
    after = np.triu(np.ones(weighed.shape[1:]), k=1)
    total = np.cumsum(weighed * after, axis=2)
    return np.concatenate([np.zeros_like(total[:, :, :1]), total], axis=2)


def _cheapest(reach: Array, kinds: slice) -> tuple[Array, Array]:
    """Return per site and residual ``[M, T]`` the least value, and the flat node that has it."""
    sites, steps, residuals, count = reach.shape
    offset = kinds.indices(count)[0]
    chosen = reach[..., kinds]
    width = chosen.shape[3]
    flat = chosen.transpose(0, 2, 1, 3).reshape(sites, residuals, steps * width)
    best = flat.argmin(axis=2)
    step, kind = np.divmod(best, width)
    node = (step * residuals + np.arange(residuals)[None, :]) * count + kind + offset
    return flat.min(axis=2), node
