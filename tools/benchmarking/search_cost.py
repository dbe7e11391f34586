"""Time searches, and the passes of the greedy one as Algorithm 1 is printed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ditfastattn.passes.plan.strategies import Strategy, names_of
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.calibrate import calibrate
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.site_evaluator import greedy_candidates
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import DEFAULT_TARGET
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator, relative_error


class AsPrinted(GreedyCalibrator):
    """Algorithm 1 as printed: evaluate the whole model for each candidate."""

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the next step."""
        self._args, self._row = args, list[Strategy]()
        return super().step(args)

    def _choose(self, index: int, environment: Any, reference: Tensor, began: float) -> Strategy:
        evaluator = self._evaluator
        chosen = Strategy.FULL
        for strategy in greedy_candidates(self.sites[index], self.layout):
            whole = evaluator.begin(self._args)
            for earlier, decided in enumerate(self._row):
                evaluator.advance(whole, earlier)
                evaluator.put(whole, earlier, evaluator.attend(whole, earlier, decided))
            evaluator.advance(whole, index)
            attended = evaluator.attend(whole, index, strategy)
            evaluator.put(whole, index, attended)
            output = evaluator.finish(whole, index)[0]
            self.literal_forwards += 1
            if relative_error(reference, output) < (index + 1) / len(self.sites) * self.threshold:
                chosen = strategy
                break
        self._row.append(chosen)
        evaluator.put(environment, index, evaluator.attend(environment, index, chosen))
        return chosen


def timed_search(
    pipeline: Any, call: dict[str, Any], method: Method, attention_only: bool = True
) -> dict[str, Any]:
    """Search; return the plan's record and the time at which each phase began."""
    began = time.monotonic()
    phases: dict[str, float] = {}

    def note(progress: SearchProgress) -> None:
        phases.setdefault(progress.phase, time.monotonic() - began)

    plan = calibrate(
        pipeline,
        call,
        target=DEFAULT_TARGET,
        method=method,
        held_out={**call, "class_labels": [1, 4, 6, 9]},
        attention_only=attention_only,
        on_progress=note,
    )
    seconds = time.monotonic() - began
    record = plan.calibration.model_dump(mode="json")
    strengths = [float(phase.split()[-1]) for phase in phases if "a greedy pass" in phase]
    return {**record, "seconds": seconds, "phases": phases, "strengths": strengths}


def greedy_pass(
    pipeline: Any, call: dict[str, Any], threshold: float, algorithm: type[GreedyCalibrator]
) -> dict[str, Any]:
    """Time a pass over all calibration prompts as one batch."""
    prompt = Prompt(call, 0)
    with open_session(pipeline, prompt, attention_only=True) as session:
        started = time.monotonic()
        captured, sites = session.captured, session.sites
        greedy = algorithm(captured, sites, session.layout, threshold, session.steps)
        session.run(greedy, prompt)
        return {
            "threshold": threshold,
            "seconds": time.monotonic() - started,
            "forwards": greedy.forwards,
            "as_printed": greedy.literal_forwards + session.steps,
            "forward_seconds": session.forward_seconds,
            "rows": names_of(greedy.strategies),
        }
