"""Search step by step with an integer program, in the manner of DiTFastAttnV2 (section 3.3).

One progressive pass on the compressed trajectory: a step runs dense, which gives the relative
squared error of every candidate against the present caches; an integer program saves the most
latency within a budget of summed error per step; the step runs again as chosen, and later steps go
on from there. V2 does this per head; here the unit is the site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ditfastattn.core.errors import VerifyError
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure.graph_runner import Environment
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.measure.session import Outputs, Session
from ditfastattn.runtime.search.measure.site_evaluator import SiteEvaluator, greedy_candidates
from ditfastattn.runtime.search.solve.rows import Row


class PerStepCalibrator:
    """Choose strategies step by step while a generation runs.

    ``budget`` bounds the relative squared errors of a step, summed over sites. ``known`` holds the
    rows of an interrupted search over the same generation.
    """

    def __init__(
        self,
        session: Session,
        costs: CostTable,
        budget: float,
        known: Sequence[Row] = (),
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        """Take the session and the prices."""
        self._evaluator = SiteEvaluator(session.captured, session.sites, session.layout)
        self._layout = session.layout
        self._costs = costs
        self._budget = budget
        self._known = known
        self._on_row = on_row
        self.strategies: list[Row] = []

    @property
    def forwards(self) -> float:
        """Return how many whole evaluations of the model the search has run."""
        return self._evaluator.forwards

    def step(self, args: Sequence[Tensor]) -> Outputs:
        """Run one step, choose its strategies, and return its outputs under them."""
        at = len(self.strategies)
        if at < len(self._known):
            row = self._known[at]
        elif at == 0:
            row = (Strategy.FULL,) * len(self._evaluator.sites)
        else:
            row = choose_row(self._errors(args), self._costs, self._budget)
        outputs = self._follow(args, row)
        self.strategies.append(row)
        if self._on_row is not None and at >= len(self._known):
            self._on_row(row)
        return outputs

    def _errors(self, args: Sequence[Tensor]) -> list[dict[Strategy, float]]:
        """Run the step dense and return each candidate's relative squared error, by site."""
        evaluator = self._evaluator
        environment = evaluator.begin(args)
        found: list[dict[Strategy, float]] = []
        for index, site in enumerate(evaluator.sites):
            evaluator.advance(environment, index)
            output = evaluator.attend(environment, index, Strategy.FULL)
            found.append(
                {
                    strategy: self._error(environment, index, strategy, output)
                    for strategy in greedy_candidates(site, self._layout)
                }
            )
            evaluator.put(environment, index, output)
        return found

    def _error(
        self, environment: Environment, index: int, strategy: Strategy, output: Tensor
    ) -> float:
        attended = self._evaluator.attend(environment, index, strategy)
        energy = float(output.float().square().sum())
        return float((attended - output).float().square().sum()) / max(energy, 1e-30)

    def _follow(self, args: Sequence[Tensor], row: Row) -> Outputs:
        evaluator = self._evaluator
        environment = evaluator.begin(args)
        for index, strategy in enumerate(row):
            evaluator.advance(environment, index)
            evaluator.put(environment, index, evaluator.attend(environment, index, strategy))
            evaluator.remember(environment, index, strategy)
        return evaluator.finish(environment, len(row) - 1)


def choose_row(errors: Sequence[dict[Strategy, float]], costs: CostTable, budget: float) -> Row:
    """Return the strategies of one step: the most saved with summed error at most ``budget``.

    One binary variable per site and candidate; a site takes one candidate at most, or stays full.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second's import

    choices = [
        (site, strategy, error)
        for site, candidates in enumerate(errors)
        for strategy, error in candidates.items()
    ]
    row = [Strategy.FULL] * len(errors)
    if not choices:
        return tuple(row)
    saved = [
        costs.sites[site][Strategy.FULL] - costs.sites[site][strategy]
        for site, strategy, _ in choices
    ]
    one_each = np.array([[site == chosen for chosen, _, _ in choices] for site in range(len(row))])
    scale = max(budget, 1e-30)
    summed = np.array([[min(error / scale, 1e6) for _, _, error in choices]])
    result = milp(
        -np.array(saved) / max(costs.step, 1e-30),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.astype(float), ub=1.0),
            LinearConstraint(summed, ub=1.0),
        ],
    )
    if result.x is None:  # taking nothing is always feasible
        raise VerifyError(f"the integer program of a step has no solution: {result.message}")
    for (site, strategy, _), taken in zip(choices, result.x, strict=True):
        if taken > 0.5:
            row[site] = strategy
    return tuple(row)
