"""Plans by a fixed pattern: a model with random weights has nothing to search for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.record.record_plan import record_plan

FULL, SHARE, GUIDANCE = Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_CFG
WINDOW, BOTH = Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG

# What attentions do at steps 0, 1, ..., over and over; a window where one is not legal is full.
# The least to the most that is skipped.
FIXED: Mapping[str, Sequence[Strategy]] = {
    "window": (FULL, WINDOW),
    "alternate": (FULL, SHARE),
    "window and guidance": (FULL, WINDOW, SHARE, BOTH),
    "quarter": (FULL, SHARE, SHARE, SHARE),
}


def fixed_plan(pipeline: Any, call: Mapping[str, Any], pattern: Sequence[Strategy]) -> Plan:
    """Return the plan in which every attention follows ``pattern``."""
    prompt = Prompt(dict(call), 0)
    with open_session(pipeline, prompt, attention_only=True) as session:
        session.run(DenseStepper(session), prompt)
        rows = [
            tuple(
                FULL if why_not(wanted, site) else wanted
                for site in session.sites
                for wanted in (pattern[step % len(pattern)],)
            )
            for step in range(session.steps)
        ]
        return record_plan(session, rows, session.timesteps, Calibration(method="manual"))
