"""Make plans for pipelines without searching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditfastattn.passes.plan import Calibration, Plan, Strategy
from ditfastattn.runtime.search.planned_target import record_target
from ditfastattn.runtime.search.prompts import split_prompts
from ditfastattn.runtime.search.session import open_session
from ditfastattn.runtime.search.steppers import DenseStepper
from ditfastattn.runtime.search.targets import Target


def plan_for(
    pipeline: Any,
    call: Mapping[str, Any],
    strategies: Sequence[Strategy],
    target: Target | None = None,
) -> Plan:
    """Return a plan that takes ``strategies[step]`` at every site where it is legal."""
    prompt = split_prompts(call, 0)[0]
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        rows = [
            tuple(Strategy.FULL if wanted in site.declined else wanted for site in session.sites)
            for wanted in strategies
        ]
        recorded = None if target is None else record_target(target)
        return session.plan(rows, session.timesteps, Calibration(method="manual", target=recorded))
