"""Search which steps run, and what sites do within them, jointly.

The whole-step search gives the fewest runs that meet the target. With as many runs, or a few more,
images are better than they need be: at these steps sites take shortcuts, chosen under the global
method's budget, until that slack is spent. The output of the other steps is fitted anew on the
trajectories of each such plan. Only plans that promise to be faster than the best so far are tried.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.output_site import output_site
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.calibration import Calibration, Tried
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.search.bracket import Bracket
from ditfastattn.runtime.search.joint.parts import Part, PartedCandidates
from ditfastattn.runtime.search.joint.planned_model import PlannedModel
from ditfastattn.runtime.search.joint.record import check_same_sites, record_parts
from ditfastattn.runtime.search.judge.image_judge import damage_ratio
from ditfastattn.runtime.search.judge.judgement import Judgement
from ditfastattn.runtime.search.record.planned_target import record_target, record_values
from ditfastattn.runtime.search.record.record_plan import with_tried
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row, digest_of
from ditfastattn.runtime.search.speed_search import gentlest
from ditfastattn.runtime.search.whole_steps.candidates import (
    FittedMask,
    output_column,
    planned_coefficients,
)
from ditfastattn.runtime.search.whole_steps.masks import OUTPUTS, fit_mask
from ditfastattn.runtime.search.whole_steps.search import Judged, WholeStepSearch

log = logging.getLogger(__name__)

MORE_RUNS = (0, 1, 2, 4)  # than the fewest that meet the target
ROUNDS = 3  # plans judged of each number of runs
_FASTER = 1.02  # than the best so far: what a plan must promise


@dataclass(frozen=True)
class _Tried:
    """Hold a plan and what it is worth: ``rows`` are those of the sites, the whole output last."""

    rows: list[Row]
    judged: Judged
    strength: float = 0.0
    speedup: float = 0.0  # as predicted; 0 where prices were not measured


class JointSearch:
    """Go on from a search of whole steps: spend on sites what is left of the target."""

    def __init__(self, whole: WholeStepSearch, parts: Sequence[Part]) -> None:
        """Take the search of whole steps, and the work on the sites of its model in each phase.

        Raises:
            ConfigError: the model's output cannot be fitted in its graph, or sites differ by phase.
        """
        self._whole, self._parts, self._meter = whole, parts, whole.meter
        self._spans = [part.span for part in parts]
        for part in parts:
            output = _fitted_output(part.work, whole.observed[0].latent)
            part.session.take_sites((*part.session.sites, output))
        check_same_sites(parts)
        self._rounds = 0
        self._tried: list[Tried] = []

    def run(self, start: Judged | None) -> Plan:
        """Return the fastest plan found; ``start`` is the best of whole steps, if any will do."""
        best: _Tried | None = None
        speedup = 1.0
        if start is not None:
            speedup = PartedCandidates(self._parts, start.mask.runs).whole_steps
        self._note_whole_steps(start, speedup)
        for runs in self._choices(start):
            self._begin(runs, "choosing what sites do")
            candidates = PartedCandidates(self._parts, runs)
            found = self._fastest(runs, candidates, speedup)
            if found is not None:
                best, speedup = found, found.speedup
        if best is not None:
            plan = self._plan(best)
        else:
            plan = self._whole.dense() if start is None else self._whole.plan(start)
            record = plan.calibration.model_copy(update={"method": "joint"})
            plan = plan.model_copy(update={"calibration": record})
        return with_tried(plan, *self._tried)

    def _note_whole_steps(self, start: Judged | None, speedup: float) -> None:
        if start is None:
            self._note("whole steps", "no plan that skips a step meets the target")
        else:
            steps, runs = self._whole.steps, len(start.mask.runs)
            self._note(f"{runs} of {steps} steps", "meets the target", speedup)

    def _note(self, what: str, outcome: str, speedup: float | None = None) -> None:
        log.info("joint search: %s: %s", what, outcome)
        rounded = None if speedup is None else round(speedup, 3)
        self._tried.append(Tried(what=what, outcome=outcome, predicted_speedup=rounded))

    def refit(self, rows: Sequence[Row], runs: Sequence[int]) -> Plan:
        """Return the plan in which sites do ``rows`` at the steps ``runs``, fitted anew.

        Raises:
            TargetMissedError: the worst prompt misses the target.
        """
        planned = self._with_output(rows, runs)
        judged = self._judged(planned, tuple(runs))
        self._whole.check_refitted(judged)
        for part in self._parts:
            part.work.note(part.session.timesteps)
        return self._plan(_Tried(planned, judged))

    def _choices(self, start: Judged | None) -> list[tuple[int, ...]]:
        """Return which steps run in the plans to try: few first, all of them last."""
        masks, steps = self._whole.masks, self._whole.steps
        fewest = max(masks, default=steps) if start is None else len(start.mask.runs)
        chosen = [masks[fewest + more] for more in MORE_RUNS if fewest + more in masks]
        return [*chosen, tuple(range(steps))]

    def _fastest(
        self, runs: tuple[int, ...], candidates: PartedCandidates, speedup: float
    ) -> _Tried | None:
        """Return the fastest plan found in which ``runs`` run; None if none beats ``speedup``."""
        what = f"{len(runs)} of {self._whole.steps} steps, and sites"
        wanted, missed = _FASTER * speedup, ""
        bracket = Bracket(gentlest(candidates, self._parts[0].session, wanted).strength)
        best: _Tried | None = None
        for _ in range(ROUNDS):
            rows = candidates.rows(bracket.strength)
            if candidates.speedup(rows) < wanted:
                break
            planned = self._with_output(rows, runs)
            judged = self._judged(planned, runs)
            met = self._whole.judge.meets((*judged.judged, *judged.checked))
            if met:
                best = _Tried(planned, judged, bracket.strength, candidates.speedup(rows))
                wanted = _FASTER * best.speedup
            elif best is None:
                missed = self._missed(judged)
                break  # no plan of these runs is fast enough
            bracket.record(met)
            bracket.move(self._used(judged, runs, met))
            if bracket.closed:
                break
        if best is not None:
            self._note(what, "meets the target", best.speedup)
        else:
            promised = f"no plan promises {wanted:.2f}x, 2% more than the best so far"
            self._note(what, missed or promised)
        return best

    def _missed(self, judged: Judged) -> str:
        """Say how far the worst image of a plan that misses the target is."""
        target = self._whole.request.target
        worst = target.worst([item.value for item in (*judged.judged, *judged.checked)])
        return f"as fast, {target.name} of the worst image is {worst:.4g}"

    def _used(self, judged: Judged, runs: Sequence[int], met: bool) -> float:
        """Return how much sites use of the damage that skipped steps leave to be done."""
        known = self._whole.known.get(len(runs))
        before = damage_ratio(known.judged, True) if known is not None else 0.0
        ratio = damage_ratio((*judged.judged, *judged.checked), met)
        return max(ratio - before, 0.0) / (1.0 - before) if before < 1.0 else ratio

    def _with_output(self, rows: Sequence[Row], runs: Sequence[int]) -> list[Row]:
        column = output_column(runs, self._spans, OUTPUTS)
        return [(*row, output) for row, output in zip(rows, column, strict=True)]

    def _judged(self, rows: Sequence[Row], runs: tuple[int, ...]) -> Judged:
        """Fit the plan ``rows`` on its own trajectories, and judge it, held-out prompts last."""
        whole, model = self._whole, PlannedModel(self._parts, rows)
        self._rounds += 1
        self._begin(runs, "the calibration prompts")

        def fitted() -> dict[str, Any]:
            module = transformer_of(self._parts[0].session.pipeline, "calibrate(pipeline)")
            rollouts = model.rollouts(module, whole.observed)
            mask, states = fit_mask(rollouts, runs, self._meter.spend, rule=whole.rule)
            judged = whole.judge.replayed(mask, whole.request.prompts, whole.observed, states)
            fits = [None if each is None else each.tolist() for each in mask.coefficients]
            return {"coefficients": fits, "judged": _as_data(judged)}

        def checked() -> list[Any]:
            return _as_data(whole.judge.held_out(mask, whole.observed[0], model.forward))

        kept = whole.checkpoint.data(f"joint-calibration-{digest_of(rows)}", fitted)
        fits = [None if each is None else torch.tensor(each) for each in kept["coefficients"]]
        mask = FittedMask(runs, tuple(fits), OUTPUTS)
        found = Judged(mask, _as_judgements(kept["judged"]))
        if not whole.judge.meets(found.judged):
            return found
        self._begin(runs, "the held-out prompts")
        kept = whole.checkpoint.data(f"joint-held-out-{digest_of(rows)}", checked)
        return replace(found, checked=_as_judgements(kept))

    def _begin(self, runs: Sequence[int], what: str) -> None:
        self._meter.begin(f"{len(runs)} of {self._whole.steps} steps, and sites: {what}")

    def _plan(self, found: _Tried) -> Plan:
        request, judged = self._whole.request, found.judged
        target = request.target
        coefficients = planned_coefficients(judged.mask, self._whole.observed[0])
        calibration = Calibration(
            method="joint",
            target=record_target(target),
            strength=found.strength,
            seed=request.seed,
            calibrated=record_values(target, [item.value for item in judged.judged]),
            held_out=record_values(target, [item.value for item in judged.checked]),
            predicted_speedup=round(found.speedup, 3) or None,
            rounds=self._rounds,
            forwards=round(self._meter.forwards, 1),
            seconds=round(self._meter.seconds, 1),
        )
        return record_parts(self._parts, found.rows, coefficients, calibration)


def _fitted_output(work: Work, latent: str) -> Site:
    """Return the whole output of the session's model, which is fitted to ``latent``."""
    try:
        site = output_site(work.session.captured, latent)
    except ValueError as error:
        raise _unfitted(str(error)) from error
    if site.no_fit:
        raise _unfitted(site.no_fit)
    return site


def _unfitted(reason: str) -> ConfigError:
    return ConfigError(
        "the model's whole output cannot be fitted in its graph",
        where="calibrate(method='joint')",
        got=reason,
        remedy="search sites alone (method='global'), or whole steps alone",
    )


def _as_data(judged: Sequence[Judgement]) -> list[Any]:
    return [[item.value, item.damage, item.allowed] for item in judged]


def _as_judgements(data: Sequence[Any]) -> list[Judgement]:
    return [Judgement(*item) for item in data]
