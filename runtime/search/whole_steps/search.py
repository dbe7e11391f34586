"""Search a plan of whole steps: as few runs of the model as the target allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.search.judge.judgement import Judgement, judge_images
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import fit
from ditfastattn.runtime.search.whole_steps.judge import Judge
from ditfastattn.runtime.search.whole_steps.masks import (
    Path,
    Rule,
    drift,
    fit_mask,
    search_masks,
)
from ditfastattn.runtime.search.whole_steps.observe import Observed, observe
from ditfastattn.runtime.search.whole_steps.record import Recorder
from ditfastattn.runtime.search.whole_steps.rollout import HISTORY, Rollout

log = logging.getLogger(__name__)

FITTED_ON = 8  # images at least; four are fitted 2 to 3 dB better than others turn out
SEARCHED_ON = 3  # of these
MOST_RUNS = 0.5  # of the steps: above, sites within the steps save more than whole steps
FEW_STEPS = 8  # of which more may run


@dataclass(frozen=True)
class _Judged:
    mask: FittedMask
    judged: list[Judgement]


class WholeStepSearch:
    """Find the plan of the fewest runs that meets a target on its worst prompt."""

    def __init__(self, pipeline: Any, recorder: Recorder, checkpoint: Checkpoint) -> None:
        """Take what is searched, and for what."""
        self._pipeline, self._recorder, self._checkpoint = pipeline, recorder, checkpoint
        self._request, self._meter = recorder.request, recorder.meter
        self._judge = Judge(pipeline, recorder, checkpoint)
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
            if self._judge.meets(self._calibrated(masks[numbers[middle]]).judged):
                high = middle
            else:
                low = middle + 1
        for number in numbers[low:]:
            found = self._calibrated(masks[number])
            if not self._judge.meets(found.judged):
                continue
            self._meter.begin(f"{number} of {self._steps} steps: the held-out prompts")
            checked = self._judge.held_out(found.mask, self._observed[0])
            if self._judge.meets(checked):
                return self._plan(found, checked)
        return self._dense()

    def refit(self, plan: Plan) -> Plan:
        """Return ``plan`` with coefficients for these generations; the steps that run stay.

        Raises:
            TargetMissedError: the worst prompt misses the target.
        """
        old = [step for step, row in enumerate(plan.strategies) if row[0].computes]
        last = max(plan.sampler.steps - 1, 1)
        found = self._calibrated(sorted({round(step * (self._steps - 1) / last) for step in old}))
        self._meter.begin("the held-out prompts")
        meets = self._judge.meets(found.judged)
        checked = self._judge.held_out(found.mask, self._observed[0]) if meets else []
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
        return self._plan(found, checked)

    def curve(self, numbers: Sequence[int]) -> dict[int, Plan]:
        """Return the plans in which so many steps run, fitted and not judged."""
        masks = self._masks()
        return {number: self.fitted(masks[number]) for number in numbers if number in masks}

    def fitted(self, runs: Sequence[int], rule: Rule = fit) -> Plan:
        """Return the plan in which ``runs`` run, by a ``rule`` for the others; it is not judged."""
        mask, _ = fit_mask(self.rollouts, runs, self._meter.spend, rule=rule)
        return self._plan(_Judged(mask, []), [])

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
    def rollouts(self) -> list[Rollout]:
        """Return the dense generations of the calibration prompts, to go on from any step."""
        module = transformer_of(self._pipeline, "calibrate(pipeline)")
        return [Rollout(module, observed) for observed in self._observed]

    def _masks(self) -> dict[int, tuple[int, ...]]:
        def make() -> list[list[int]]:
            most = min(self._steps - 1, max(FEW_STEPS, int(MOST_RUNS * self._steps)))
            images = self._spread(SEARCHED_ON)
            self._meter.begin("which steps run")
            rollouts = [self.rollouts[index] for index in images]
            found = search_masks(rollouts, most, self._meter.spend)
            return [list(self._best(paths, images).runs) for paths in found.values()]

        kept = self._checkpoint.data("masks", make)
        return {len(runs): tuple(runs) for runs in kept}

    def _best(self, paths: Sequence[Path], images: Sequence[int]) -> Path:
        """Return the path whose worst image is best by the target's metric.

        Latents do not show it all: noise that the last step would have taken away is small there.
        """
        target = self._request.target
        if target.kind is not TargetKind.QUALITY or len(paths) == 1:
            return paths[0]
        prompts = [self._request.prompts[index] for index in images]
        observed = [self._observed[index] for index in images]
        worst = []
        for path in paths:
            mask = FittedMask(path.runs, path.coefficients, HISTORY - 1)
            judged = self._judge.replayed(mask, prompts, observed, path.states)
            worst.append(target.worst([item.value for item in judged]))
        return paths[worst.index(max(worst) if target.at_least else min(worst))]

    def _spread(self, count: int) -> list[int]:
        """Return ``count`` images, from that which is hardest to that which is easiest.

        That is where every third step runs. Masks that are found on them suit other images by 1 to
        3 dB more, on the demo's model, than those found on the first ones, or the hardest alone.
        """
        self._meter.begin("which images are hard")
        _, states = fit_mask(self.rollouts, range(0, self._steps, 3), self._meter.spend)
        pairs = zip(self.rollouts, states, strict=True)
        missed = [drift([rollout], [state], self._steps) for rollout, state in pairs]
        order = sorted(range(len(missed)), key=missed.__getitem__, reverse=True)
        places = [round(place * (len(order) - 1) / max(count - 1, 1)) for place in range(count)]
        return [order[place] for place in dict.fromkeys(places)]

    def _calibrated(self, runs: Sequence[int]) -> _Judged:
        """Return the plan in which ``runs`` run, fitted and judged on the calibration prompts."""
        number = len(runs)
        if number not in self._known:
            self._meter.begin(f"{number} of {self._steps} steps: the calibration prompts")
            mask, states = fit_mask(self.rollouts, runs, self._meter.spend)
            judged = self._judge.replayed(mask, self._request.prompts, self._observed, states)
            self._known[number] = _Judged(mask, judged)
        return self._known[number]

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
        return self.fitted(masks[max(fitting)])

    def _dense(self) -> Plan:
        log.warning("ditfastattn: no plan that skips a step meets the target: every step runs")
        mask = FittedMask(tuple(range(self._steps)), (None,) * self._steps, 1)
        pairs = zip(self._request.prompts, self._observed, strict=True)
        target = self._request.target
        perfect = [
            item
            for prompt, observed in pairs
            for item in judge_images(target, observed.images, observed.images, prompt.call)
        ]
        return self._plan(_Judged(mask, perfect), [])

    def _plan(self, found: _Judged, checked: Sequence[Judgement]) -> Plan:
        rounds = len(self._known)
        return self._recorder.plan(found.mask, self._observed[0], found.judged, checked, rounds)
