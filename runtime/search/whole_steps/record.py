"""What a plan of whole steps is searched for, and the plan with the record of its search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.judgement import Judgement
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.timing import device_name
from ditfastattn.runtime.search.record.planned_target import record_target, record_values
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask, planned_coefficients
from ditfastattn.runtime.search.whole_steps.meter import Meter
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.subject import Subject


@dataclass(frozen=True)
class Request:
    """Say what a plan is searched for."""

    target: Target
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    layout: CfgLayout
    timestep: str
    seed: int


@dataclass(frozen=True)
class Recorder:
    """Write plans of what was found."""

    subject: Subject
    request: Request
    meter: Meter

    def plan(
        self,
        mask: FittedMask,
        observed: Observed,
        judged: Sequence[Judgement] = (),
        checked: Sequence[Judgement] = (),
        rounds: int = 0,
    ) -> Plan:
        """Return the plan of ``mask``.

        Args:
            mask: the steps that run, and the coefficients of the others.
            observed: a dense generation.
            judged: what the calibration prompts' images are worth.
            checked: what the held-out prompts' images are worth.
            rounds: how many plans were judged.
        """
        request, steps = self.request, len(mask.coefficients)
        values = [[item.value for item in items] for items in (judged, checked)]
        calibrated, held_out = (
            record_values(request.target, found) if found else None for found in values
        )
        column, site = mask.column(observed.spans), self.subject.site(observed)
        kept = [
            strategy.outputs_read * sum(call.output.nbytes for call in step.calls)
            for strategy, step in zip(column, observed.steps, strict=True)
        ]
        calibration = Calibration(
            method="whole-steps",
            target=record_target(request.target),
            strength=float(steps - len(mask.runs)),
            seed=request.seed,
            batch=len(observed.steps[0].calls[0].output),
            cache_bytes=max(kept),
            calibrated=calibrated,
            held_out=held_out,
            predicted_speedup=observed.speedup(mask.runs),
            device=device_name(),
            rounds=rounds,
            forwards=round(self.meter.forwards, 1),
            seconds=round(self.meter.seconds, 1),
            versions={"torch": torch.__version__},
        )
        return Plan(
            model=self.subject.identity,
            inputs=self.subject.inputs(observed),
            text=self.subject.text,
            sampler=self.subject.sampler(observed),
            sites=(site.model_copy(update={"coefficients": planned_coefficients(mask, observed)}),),
            strategies=tuple((strategy,) for strategy in column),
            calibration=calibration,
        )
