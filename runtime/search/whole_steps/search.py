"""Search a plan of whole steps: as few runs of the model as the target allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Calibration, Plan
from ditfastattn.runtime.opaque import OpaqueModel
from ditfastattn.runtime.pipeline.denoiser import Forward, replace_forward, transformer_of
from ditfastattn.runtime.pipeline.model_call import with_output
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.judge.targets import Judgement, Target, TargetKind
from ditfastattn.runtime.search.measure.timing import device_name
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.record.planned_target import record_target, record_values
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask, planned_output
from ditfastattn.runtime.search.whole_steps.masks import drift, fit_mask, search_masks
from ditfastattn.runtime.search.whole_steps.meter import Meter
from ditfastattn.runtime.search.whole_steps.observe import Observed, observe
from ditfastattn.runtime.search.whole_steps.rollout import Rollout, State
from ditfastattn.runtime.search.whole_steps.subject import Subject

log = logging.getLogger(__name__)

FITTED_ON = 8  # images at least; four are fitted 2 to 3 dB better than others turn out
SEARCHED_ON = 3  # of these
MOST_RUNS = 0.5  # of the steps: above, sites within the steps save more than whole steps
FEW_STEPS = 8  # of which more may run


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
class _Judged:
    mask: FittedMask
    judged: list[Judgement]


class WholeStepSearch:
    """Find the plan of the fewest runs that meets a target on its worst prompt."""

    def __init__(
        self,
        pipeline: Any,
        subject: Subject,
        request: Request,
        checkpoint: Checkpoint,
        meter: Meter,
    ) -> None:
        """Take what is searched, and for what."""
        self._pipeline, self._subject, self._request = pipeline, subject, request
        self._checkpoint, self._meter = checkpoint, meter
        self._module = transformer_of(pipeline, "calibrate(pipeline)")
        self._known: dict[int, _Judged] = {}

    def run(self) -> Plan:
        """Return the plan; one in which every step runs where no other meets a quality.

        Raises:
            TargetMissedError: no plan is fast enough.
            ConfigError: the pipeline is not supported.
        """
        masks = self._masks()
        if self._request.target.kind is TargetKind.SPEEDUP:
            return self._fast_enough(masks)
        numbers = sorted(masks)
        low, high = 0, len(numbers)  # the fewest runs that will do are numbers[low:high]
        while low < high:
            middle = (low + high) // 2
            if self._meets(self._calibrated(masks[numbers[middle]]).judged):
                high = middle
            else:
                low = middle + 1
        for number in numbers[low:]:
            found = self._calibrated(masks[number])
            if not self._meets(found.judged):
                continue
            self._meter.begin(f"{number} of {self._steps} steps: the held-out prompts")
            checked = self._held_out(found.mask)
            if self._meets(checked):
                return self._plan(found.mask, found.judged, checked)
        return self._plan(self._dense_mask(), self._perfect(), [])

    def refit(self, plan: Plan) -> Plan:
        """Return ``plan`` with coefficients for these generations; the steps that run stay.

        Raises:
            TargetMissedError: the worst prompt misses the target.
        """
        old = [step for step, row in enumerate(plan.strategies) if row[0].computes]
        last = max(plan.sampler.steps - 1, 1)
        runs = sorted({round(step * (self._steps - 1) / last) for step in old})
        found = self._calibrated(runs)
        self._meter.begin("the held-out prompts")
        checked = self._held_out(found.mask) if self._meets(found.judged) else []
        target = self._request.target
        missed = [item.value for item in (*found.judged, *checked) if not target.met_by(item.value)]
        if missed:
            raise TargetMissedError(
                "the plan, fitted anew, misses the target",
                where=target.describe(),
                got=f"{target.worst(missed):.4g} on the worst prompt",
                expected=f"{target.bound:g}",
                remedy="calibrate a new plan for this guidance and these steps",
            )
        return self._plan(found.mask, found.judged, checked)

    def curve(self, numbers: Sequence[int]) -> dict[int, Plan]:
        """Return the plans in which so many steps run, fitted and not judged."""
        masks = self._masks()
        found = {}
        for number in numbers:
            mask, _ = fit_mask(self._rollouts, masks[number], self._meter.spend)
            found[number] = self._plan(mask, [], [])
        return found

    @property
    def _steps(self) -> int:
        return len(self._observed[0].steps)

    @cached_property
    def _observed(self) -> list[Observed]:
        self._meter.begin("dense generations")
        found: list[Observed] = []
        for prompt in self._request.prompts:
            found.append(observe(self._pipeline, prompt, self._request.layout))
            self._meter.spend(len(found[-1].steps))
        return found

    @cached_property
    def _rollouts(self) -> list[Rollout]:
        return [Rollout(self._module, observed) for observed in self._observed]

    def _masks(self) -> dict[int, tuple[int, ...]]:
        def make() -> list[list[int]]:
            most = min(self._steps - 1, max(FEW_STEPS, int(MOST_RUNS * self._steps)))
            rollouts = self._spread(SEARCHED_ON)
            self._meter.begin("which steps run")
            return [list(runs) for runs in search_masks(rollouts, most, self._meter.spend).values()]

        kept = self._checkpoint.data("masks", make)
        return {len(runs): tuple(runs) for runs in kept}

    def _spread(self, count: int) -> list[Rollout]:
        """Return ``count`` generations, from that which is hardest to that which is easiest.

        That is where every third step runs. Masks that are found on them suit other images by 1 to
        3 dB more, on the demo's model, than those found on the first ones, or the hardest alone.
        """
        self._meter.begin("which images are hard")
        _, states = fit_mask(self._rollouts, range(0, self._steps, 3), self._meter.spend)
        pairs = zip(self._rollouts, states, strict=True)
        missed = [drift([rollout], [state], self._steps) for rollout, state in pairs]
        order = sorted(range(len(missed)), key=missed.__getitem__, reverse=True)
        places = [round(place * (len(order) - 1) / max(count - 1, 1)) for place in range(count)]
        return [self._rollouts[order[place]] for place in dict.fromkeys(places)]

    def _calibrated(self, runs: Sequence[int]) -> _Judged:
        """Return the plan in which ``runs`` run, fitted and judged on the calibration prompts."""
        number = len(runs)
        if number not in self._known:
            self._meter.begin(f"{number} of {self._steps} steps: the calibration prompts")
            mask, states = fit_mask(self._rollouts, runs, self._meter.spend)
            model = self._model(mask)
            judged: list[Judgement] = []
            pairs = zip(self._request.prompts, self._observed, states, strict=True)
            for prompt, observed, state in pairs:
                images = self._replayed(model, prompt, observed, state)
                judged += self._request.target.judge(observed.images, images, prompt.call)
            self._known[number] = _Judged(mask, judged)
        return self._known[number]

    def _model(self, mask: FittedMask) -> OpaqueModel:
        """Return the model that runs by ``mask``."""
        plan = self._subject.opaque(self._plan(mask, [], []))
        return OpaqueModel(self._module, plan, self._request.timestep)

    def _replayed(
        self, model: OpaqueModel, prompt: Prompt, observed: Observed, state: State
    ) -> Tensor:
        """Return the images of ``prompt`` without running the model: it has run already."""
        form, returned = observed.steps[0].calls[0].form, iter(state.returned)

        def instead(*_args: Any, **_kwargs: Any) -> Any:
            return with_output(form, next(returned))

        return self._images(prompt, lambda _forward: model.around(instead))

    def _images(self, prompt: Prompt, make: Callable[[Forward], Forward]) -> Tensor:
        """Return the images of ``prompt`` with the model's forward replaced by ``make`` of it."""
        undo = replace_forward(self._module, make)
        try:
            return as_images(generate(self._pipeline, prompt))
        finally:
            undo()

    def _held_out(self, mask: FittedMask) -> list[Judgement]:
        model = self._model(mask)
        judged: list[Judgement] = []
        for index, prompt in enumerate(self._request.held_out):
            dense = self._dense(index, prompt)
            planned = self._images(prompt, model.around)
            self._meter.spend(len(mask.runs))
            judged += self._request.target.judge(dense, planned, prompt.call)
            if not self._meets(judged):
                break
        return judged

    def _dense(self, index: int, prompt: Prompt) -> Tensor:
        def make() -> dict[str, Tensor]:
            images = as_images(generate(self._pipeline, prompt))
            self._meter.spend(self._steps)
            return {"images": images}

        return self._checkpoint.tensors(f"dense-held-out-{index}", make)["images"]

    def _fast_enough(self, masks: Mapping[int, tuple[int, ...]]) -> Plan:
        bound = self._request.target.bound
        fitting = [number for number in masks if self._steps / number >= bound]
        if not fitting:
            raise TargetMissedError(
                "no plan of whole steps is fast enough",
                where=self._request.target.describe(),
                got=f"{self._steps / min(masks):.2f}x for {min(masks)} of {self._steps} steps",
                expected=f"{bound:g}x",
                remedy="ask for less",
            )
        mask, _ = fit_mask(self._rollouts, masks[max(fitting)], self._meter.spend)
        return self._plan(mask, [], [])

    def _dense_mask(self) -> FittedMask:
        log.warning("ditfastattn: no plan that skips a step meets the target: every step runs")
        return FittedMask(tuple(range(self._steps)), (None,) * self._steps, 1)

    def _perfect(self) -> list[Judgement]:
        pairs = zip(self._request.prompts, self._observed, strict=True)
        target = self._request.target
        return [
            item
            for prompt, observed in pairs
            for item in target.judge(observed.images, observed.images, prompt.call)
        ]

    def _meets(self, judged: Sequence[Judgement]) -> bool:
        return all(self._request.target.met_by(item.value) for item in judged)

    def _plan(
        self, mask: FittedMask, judged: Sequence[Judgement], checked: Sequence[Judgement]
    ) -> Plan:
        request, observed = self._request, self._observed[0]
        values = [[item.value for item in items] for items in (judged, checked)]
        calibrated, held_out = (
            record_values(request.target, found) if found else None for found in values
        )
        output = observed.steps[0].calls[0].output
        kept = max((strategy.outputs_read for strategy in mask.column), default=0)
        calibration = Calibration(
            method="whole-steps",
            target=record_target(request.target),
            strength=float(self._steps - len(mask.runs)),
            seed=request.seed,
            batch=len(output),
            cache_bytes=kept * output.nbytes * request.layout.calls,
            calibrated=calibrated,
            held_out=held_out,
            predicted_speedup=self._steps / len(mask.runs),
            device=device_name(),
            rounds=len(self._known),
            forwards=round(self._meter.forwards, 1),
            seconds=round(self._meter.seconds, 1),
            versions={"torch": torch.__version__},
        )
        site = planned_output(self._subject.site(observed), mask, observed)
        return Plan(
            model=self._subject.identity,
            inputs=self._subject.inputs(observed),
            sampler=self._subject.sampler(observed),
            sites=(site,),
            strategies=tuple((strategy,) for strategy in mask.column),
            calibration=calibration,
        )
