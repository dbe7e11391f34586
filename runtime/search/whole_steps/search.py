"""Search a plan of whole steps: as few runs of the model as the target allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

from torch import Tensor

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.search.judge.judgement import Judgement, dense_misses, judge_images
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.fit import RIDGE, fit
from ditfastattn.runtime.search.whole_steps.judge import Judge
from ditfastattn.runtime.search.whole_steps.masks import Begun, Rule, fit_mask
from ditfastattn.runtime.search.whole_steps.observe import observe_alike
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.record import Recorder
from ditfastattn.runtime.search.whole_steps.ridge import LOOSER, cross_validated
from ditfastattn.runtime.search.whole_steps.rollout import Rollout
from ditfastattn.runtime.search.whole_steps.searched_masks import Masks
from ditfastattn.runtime.search.whole_steps.subject import Subject

log = logging.getLogger(__name__)

FITTED_ON = 8  # images at least; four are fitted 2 to 3 dB better than others turn out


@dataclass(frozen=True)
class Judged:
    """Hold steps that run, and what the images of calibration and held-out prompts are worth."""

    mask: FittedMask
    judged: list[Judgement]
    checked: list[Judgement] = field(default_factory=list)


class WholeStepSearch:
    """Find the plan of the fewest runs that meets a target on its worst prompt."""

    def __init__(
        self, pipeline: Any, recorder: Recorder, checkpoint: Checkpoint, first: Observed
    ) -> None:
        """Take what is searched, and for what; ``first`` is the first prompt's dense generation."""
        self._pipeline, self._recorder, self.checkpoint = pipeline, recorder, checkpoint
        self.request, self.meter = recorder.request, recorder.meter
        self.judge = Judge(pipeline, recorder, checkpoint)
        self.known: dict[int, Judged] = {}  # by how many steps run
        self._first = first
        self._ridge, self._begun, self._rounds = RIDGE, Begun(), 0

    def run(self) -> Plan:
        """Return the plan; one in which every step runs where no other meets a quality.

        Raises:
            TargetMissedError: no plan is fast enough.
            ConfigError: the pipeline is not supported.
        """
        if self.request.target.kind is TargetKind.SPEEDUP:
            return self._fast_enough()
        found = self.fewest()
        return self.dense() if found is None else self.plan(found)

    def fewest(self) -> Judged | None:
        """Return the fewest runs that meet a quality on all prompts; None where none do."""
        for number in self._fitting():
            found = self._fitted_best(self.masks[number])
            if found.checked and self.judge.meets((*found.judged, *found.checked)):
                return found
        return None

    def _fitting(self) -> Iterator[int]:
        """Yield the numbers of runs that meet a quality on the calibration prompts, fewest first.

        Masks that miss it on the few images that they were searched on are passed over. Where the
        first of the others meets it on all, one run fewer may do with single runs moved.
        """
        first = True
        for number in self.masks:
            if not self.masks.promises(number):
                continue
            if self._meets(number):
                if first and self._meets_climbed(number - 1):
                    yield number - 1
                yield number
            elif self._meets_climbed(number):
                yield number
            first = False

    def _meets(self, number: int) -> bool:
        self._fit_by(RIDGE)
        return self.judge.meets(self._calibrated(self.masks[number]).judged)

    def _meets_climbed(self, number: int) -> bool:
        return number in self.masks and self._climb(number) and self._meets(number)

    def refit(self, plan: Plan) -> Plan:
        """Return ``plan`` with coefficients for these generations; the steps that run stay.

        Raises:
            TargetMissedError: the worst prompt misses the target.
        """
        old = [step for step, row in enumerate(plan.strategies) if row[0].computes]
        last = max(plan.sampler.steps - 1, 1)
        moved = {round(step * (self.steps - 1) / last) for step in old}
        runs = sorted(moved | self._first.begins)
        found = self._fitted_best(runs)
        self.check_refitted(found)
        return self.plan(found)

    def check_refitted(self, found: Judged) -> None:
        """Raise ``TargetMissedError`` where a plan that was fitted anew misses the target."""
        target, judged = self.request.target, (*found.judged, *found.checked)
        missed = [item.value for item in judged if not target.met_by(item.value)]
        if missed:
            raise TargetMissedError(
                "the plan, fitted anew, misses the target",
                where=target.describe(),
                got=f"{target.worst(missed):.4g} on the worst prompt",
                expected=f"{target.bound:g}",
                remedy="calibrate a new plan for this guidance and these steps",
            )

    def curve(self, numbers: Sequence[int]) -> dict[int, Plan]:
        """Return the plans in which so many steps run, single runs moved, fitted and not judged."""
        known = [number for number in numbers if number in self.masks]
        for number in known:
            self._climb(number)
        return {number: self.fitted(self.masks[number]) for number in known}

    def fitted(self, runs: Sequence[int], rule: Rule | None = None) -> Plan:
        """Return the plan in which ``runs`` run, by a ``rule`` for the others; it is not judged."""
        begun = self._begun if rule is None else None
        rule = rule or self.rule
        mask, _ = fit_mask(self.rollouts, runs, self.meter.spend, rule=rule, begun=begun)
        return self.plan(Judged(mask, []))

    @property
    def rule(self) -> Rule:
        """Return how the output at skipped steps is fitted."""
        return partial(fit, ridge=self._ridge)

    def _looser(self, runs: Sequence[int]) -> list[float]:
        """Return the ridges that keep closer to the linear rule and suit unseen images better.

        Images are generated by fits that have not seen them. Such a ridge must make the worst of
        them better, and the mean no worse: the worst of a few is uncertain.
        """
        target = self.request.target

        def unseen(ridge: float) -> tuple[float, float]:
            rule = partial(fit, ridge=ridge)
            judged = [
                target.gain(item.value)
                for fold in cross_validated(self.rollouts, runs, rule, self.meter.spend)
                for item in self.judge.replayed(
                    fold.mask(runs),
                    [self.request.prompts[image] for image in fold.images],
                    [self.observed[image] for image in fold.images],
                    fold.states,
                )
            ]
            return min(judged), sum(judged) / len(judged)

        def choose() -> list[float]:
            usual = unseen(RIDGE)
            found = [(ridge, *unseen(ridge)) for ridge in LOOSER]
            return [ridge for ridge, *its in found if its[0] > usual[0] and its[1] >= usual[1]]

        self.meter.begin(f"{len(runs)} of {self.steps} steps: how closely to fit")
        looser: list[float] = self.checkpoint.data("looser", choose)
        log.info("whole steps: looser ridges that suit unseen images better: %s", looser)
        return looser

    def _fitted_best(self, runs: Sequence[int]) -> Judged:
        """Return the plan of ``runs`` by the usual ridge, or by a looser one if that misses."""
        found = self._fitted_by(RIDGE, runs)
        if not found.checked or self.judge.meets(found.checked):
            return found
        for ridge in self._looser(runs):
            found = self._fitted_by(ridge, runs)
            if found.checked and self.judge.meets(found.checked):
                break
        return found

    def _fitted_by(self, ridge: float, runs: Sequence[int]) -> Judged:
        """Return the plan of ``runs``; held-out prompts are judged where the others are met."""
        self._fit_by(ridge)
        found = self._calibrated(runs)
        if not self.judge.meets(found.judged):
            return found
        self.meter.begin(f"{len(runs)} of {self.steps} steps: the held-out prompts")
        return replace(found, checked=self.judge.held_out(found.mask, self.observed[0]))

    def _fit_by(self, ridge: float) -> None:
        """Fit by ``ridge`` from now on; what was fitted by another is forgotten."""
        if ridge != self._ridge:
            self._ridge = ridge
            self._begun.clear()
            self.known.clear()

    @property
    def subject(self) -> Subject:
        """Return the model that is searched."""
        return self._recorder.subject

    @property
    def steps(self) -> int:
        """Return how many steps a generation has."""
        return len(self.observed[0].steps)

    @cached_property
    def observed(self) -> list[Observed]:
        """Return the dense generations of the calibration prompts."""
        self.meter.begin("dense generations")
        found = [self._first]
        for prompt in self.request.prompts[1:]:
            found.append(observe_alike(self._pipeline, prompt, self._first, self.request.timestep))
            self.meter.spend(len(found[-1].steps))
        return found

    def generate_dense(self) -> list[Tensor]:
        """Generate all prompts densely; return the images of the calibration prompts."""
        self.meter.begin("dense generations")
        self.judge.generate_held_out(self.steps)
        return [each.images for each in self.observed]

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Return the dense generations of the calibration prompts, to go on from any step."""
        module = transformer_of(self._pipeline, "calibrate(pipeline)")
        return [Rollout(module, observed) for observed in self.observed]

    @cached_property
    def masks(self) -> Masks:
        """Return which steps run, by how many."""
        return Masks(self._recorder, self.checkpoint, self.judge, self.observed, self.rollouts)

    def _climb(self, number: int) -> bool:
        """Move single runs of a mask, and forget what was made of it; return whether any moved."""
        moved = self.masks.climb(number)
        if moved:
            self.known.pop(number, None)
        return moved

    def _calibrated(self, runs: Sequence[int]) -> Judged:
        """Return the plan in which ``runs`` run, fitted and judged on the calibration prompts."""
        number = len(runs)
        if number not in self.known:
            self._rounds += 1
            self.meter.begin(f"{number} of {self.steps} steps: the calibration prompts")
            rule, begun = self.rule, self._begun
            mask, states = fit_mask(self.rollouts, runs, self.meter.spend, rule=rule, begun=begun)
            judged = self.judge.replayed(mask, self.request.prompts, self.observed, states)
            self.known[number] = Judged(mask, judged)
        return self.known[number]

    def _fast_enough(self) -> Plan:
        masks, bound, speedup = self.masks, self.request.target.bound, self._first.speedup
        fast = list(takewhile(lambda number: speedup(masks[number]) >= bound, masks))
        if not fast:
            fewest = next((masks[number] for number in masks), range(self.steps))
            raise TargetMissedError(
                "no plan of whole steps is fast enough",
                where=self.request.target.describe(),
                got=f"{speedup(fewest):.2f}x for {len(fewest)} of {self.steps} steps",
                expected=f"{bound:g}x",
                remedy="ask for less",
            )
        self._climb(fast[-1])
        return self.fitted(masks[fast[-1]])

    def dense(self) -> Plan:
        """Return the plan in which every step runs.

        Raises:
            TargetMissedError: even the dense images miss the target.
        """
        log.warning("ditfastattn: no plan that skips a step meets the target: every step runs")
        mask = FittedMask(tuple(range(self.steps)), (None,) * self.steps, 1)
        pairs = zip(self.request.prompts, self.observed, strict=True)
        target = self.request.target
        perfect = [
            item
            for prompt, observed in pairs
            for item in judge_images(target, observed.images, observed.images, prompt.call)
        ]
        if not self.judge.meets(perfect):
            raise dense_misses(target, perfect)
        return self.plan(Judged(mask, perfect))

    def plan(self, found: Judged) -> Plan:
        """Return the plan of ``found``."""
        dense, rounds = self.observed[0], self._rounds
        return self._recorder.plan(found.mask, dense, found.judged, found.checked, rounds)
