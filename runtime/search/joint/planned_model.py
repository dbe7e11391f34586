"""Run the model at the steps that run, its sites by a plan's strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.call_order import calls_in_order
from ditfastattn.runtime.pipeline.forwards import Forward, replace_forward
from ditfastattn.runtime.search.joint.parts import Part
from ditfastattn.runtime.search.measure.steppers import PlanStepper
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.rollout import Rollout


@dataclass(frozen=True)
class PlannedModel:
    """Run ``rows``, whose last site is the whole output; what it does at skipped steps is not seen.

    Each of ``parts`` runs its own phase.
    """

    parts: Sequence[Part]
    rows: Sequence[Row]

    def forward(self) -> Forward:
        """Return what runs the steps of one generation that run, in order."""
        forwards = [self._forward_of(part) for part in self.parts]
        order = calls_in_order([part.span for part in self.parts])
        phases = iter([call.phase for call in order if self.rows[call.step][-1].computes])
        return lambda *args, **kwargs: forwards[next(phases)](*args, **kwargs)

    def _forward_of(self, part: Part) -> Forward:
        rows = part.own(self.rows)
        runs = [step for step, row in enumerate(rows) if row[-1].computes]
        rows = [row if row[-1].computes else (*row[:-1], Strategy.SHARE_STEP) for row in rows]
        return part.session.forward_by(PlanStepper(part.work.variants, rows, runs=runs))

    def rollouts(self, module: nn.Module, observed: Sequence[Observed]) -> list[Rollout]:
        """Return the ``observed`` generations of ``module``, to go on with from the first step."""
        return [Rollout(_calling(module, self.forward()), each) for each in observed]


def _calling(module: nn.Module, forward: Forward) -> Callable[..., Any]:
    """Return what calls ``module``, with its hooks, and ``forward`` within it."""

    def call(**arguments: Any) -> Any:
        undo = replace_forward(module, lambda _own: forward)
        try:
            return module(**arguments)
        finally:
            undo()

    return call
