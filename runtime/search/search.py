"""Search a plan for a target: turn one number, the strength of a plan, until the target is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from ditfastattn.passes.plan.calibration import Calibration, Measured, SearchMethod
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.candidates import Candidates, Found
from ditfastattn.runtime.search.judge.image_judge import CALIBRATION, HELD_OUT, ImageJudge
from ditfastattn.runtime.search.measure.timing import PairedTiming
from ditfastattn.runtime.search.methods import Chooser
from ditfastattn.runtime.search.options import SearchOptions
from ditfastattn.runtime.search.quality_search import QualitySearch
from ditfastattn.runtime.search.record.planned_target import record_target, record_values
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.speed_search import SpeedSearch


class Search:
    """Search one plan, and return it with the record of its search."""

    def __init__(
        self,
        work: Work,
        chooser: Chooser,
        options: SearchOptions,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
    ) -> None:
        """Take what the search works with."""
        self._work = work
        self._options = options
        self._target = options.target
        self._candidates = Candidates(chooser, options.max_variants > 0)
        self._judge = ImageJudge(work, self._target, {CALIBRATION: prompts, HELD_OUT: held_out})

    def quality(self) -> Found:
        """Return the strongest plan whose worst calibration and held-out prompts meet the target.

        Raises:
            TargetMissedError: even the dense images miss the target.
        """
        rounds = self._options.max_rounds
        return QualitySearch(self._work, self._candidates, self._judge, rounds).run()

    def threshold(self) -> Found:
        """Return the plan of the target's own strength."""
        strength = self._target.bound
        return Found(self._candidates.rows(strength), strength, rounds=1)

    def speed(self, measure: Callable[[Plan], PairedTiming]) -> tuple[Found, PairedTiming]:
        """Return the gentlest plan that is measured fast enough, and its timing.

        Raises:
            TargetMissedError: the fastest plan is not fast enough.
        """

        def measure_found(found: Found) -> PairedTiming:
            return measure(self.plan(found, 0.0))

        return SpeedSearch(self._work, self._candidates, self._target, measure_found).run()

    def plan(self, found: Found, seconds: float, timing: PairedTiming | None = None) -> Plan:
        """Return the plan with its record."""
        options = self._options
        calibration = Calibration(
            method=cast(SearchMethod, options.method.value),  # auto has been resolved
            target=record_target(self._target),
            strength=found.strength,
            seed=options.seed,
            calibrated=self._recorded(found.calibrated),
            held_out=self._recorded(found.held_out),
            predicted_speedup=round(self._candidates.speedup(found.rows), 3),
            measured_speedup=timing and round(timing.speedup.median, 3),
            measured_seconds=timing and round(timing.candidate.median, 4),
            rounds=found.rounds,
            forwards=round(self._work.forwards, 1),
            seconds=round(seconds, 1),
        )
        timesteps, capped = self._work.timesteps, options.max_variants > 0
        return record_plan(self._work.session, found.rows, timesteps, calibration, capped)

    def _recorded(self, values: Sequence[float]) -> Measured | None:
        return record_values(self._target, values) if values else None
