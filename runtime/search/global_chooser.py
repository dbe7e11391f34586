"""The ``global`` method: measure once, then make plans of any strength without the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.judgement import allowed_damages, judge_images
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.error_table import Array, ErrorTable, error_table
from ditfastattn.runtime.search.measure.latency import CostTable, Objective
from ditfastattn.runtime.search.measure.profile import Profiler, Sketch
from ditfastattn.runtime.search.measure.sensitivity import probe_rows, probe_steps, site_weights
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.steppers import PlanStepper
from ditfastattn.runtime.search.methods import measured_costs
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.at_steps import idle_when_skipped
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.memory import within_memory
from ditfastattn.runtime.search.solve.problem import Problem
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.runtime.search.solve.variants import capped_within_budget
from ditfastattn.runtime.search.solve.window_choice import (
    choose_windows,
    chosen_sites,
    with_chosen,
)

PROFILED = 2  # prompts whose errors are measured; the others only judge
# The worst prompt's damage at a drift of 1, to begin with. On the demo model the mean prompt's was
# 0.16 to 0.22 and the worst of eight's 0.31 to 0.56, over plans of 1.6x to 2x.
_WORST_DAMAGE = 0.5


@dataclass
class GlobalChooser:
    """Choose all strategies under one budget of drift of the image."""

    problem: Problem
    first: float
    most: int
    max_cache_bytes: int = 0
    cache_bytes: Callable[[Sequence[Row]], int] = lambda _: 0
    tries: int = 60
    order: float = 2.0
    predicts: bool = True

    @property
    def costs(self) -> CostTable:
        """Return the prices."""
        return self.problem.costs

    def rows(self, strength: float) -> list[Row]:
        """Return the cheapest plan found of at most ``strength`` drift, within the caps."""
        choose = partial(self._choose, strength=strength)
        if self.max_cache_bytes == 0:
            return choose(self.problem)
        return within_memory(self.problem, choose, self.cache_bytes, self.max_cache_bytes)

    def _choose(self, problem: Problem, strength: float) -> list[Row]:
        rows = within_budget(problem, strength)
        if 0 < self.most < len(set(rows)):
            rows = capped_within_budget(problem, strength, self.most)
        return idle_when_skipped(problem, rows)


def make_global(
    work: Work,
    prompts: Sequence[Prompt],
    target: Target,
    objective: Objective,
    most: int = 0,
    max_cache_bytes: int = 0,
) -> GlobalChooser:
    """Profile the first prompts, and probe one for how much errors matter."""
    session = work.session
    profile = _profiled(work, prompts[:PROFILED])
    prices = measured_costs(work, objective)
    errors = [
        error_table(profile.sketches, session.sites, session.layout, form)
        for form in range(len(prices))
    ]
    damages = _damages(work, prompts[0], target, profile)
    weights = site_weights(errors[0], profile.effects, damages)
    allowed = _allowed(work, prompts, target)
    first = math.sqrt(allowed / _WORST_DAMAGE) if allowed else _gentle(errors[0], weights)
    pairs = zip(errors, prices, strict=True)
    problem = _with_best_windows(session, [Problem(e, weights, c) for e, c in pairs], first)

    def cache_bytes(rows: Sequence[Row]) -> int:
        programs = work.variants.programs(rows, most > 0)
        return sum(program.slots.peak_bytes for program in programs)

    return GlobalChooser(problem, first, most, max_cache_bytes, cache_bytes)


def _with_best_windows(session: Session, problems: Sequence[Problem], drift: float) -> Problem:
    """Give the session's sites the best form of window; return the problem of those forms."""
    if len(problems) == 1 or drift <= 0.0:
        return problems[0]
    chosen = choose_windows(problems, drift)
    session.take_sites(chosen_sites(session.sites, chosen))
    return with_chosen(problems, chosen)


@dataclass(frozen=True)
class _Profile:
    """Hold the sketches of all profiled prompts; outputs and effects are the first prompt's."""

    sketches: tuple[Sketch, ...]
    outputs: Tensor
    effects: dict[int, list[float]]


def _profiled(work: Work, prompts: Sequence[Prompt]) -> _Profile:
    """Profile ``prompts``, the first one with probes."""
    probes = probe_steps(work.session.steps)
    found: list[dict[str, Tensor]] = []
    for index, prompt in enumerate(prompts):
        work.begin(f"profiling prompt {index + 1}")
        found.append(_profile(work, index, prompt, () if index else probes))
        work.keep_dense("calibration", index, found[-1]["images"])
    return _Profile(
        sketches=tuple(Sketch(each["outputs"], each["residuals"]) for each in found),
        outputs=found[0]["known"],
        effects=dict(zip(probes, found[0]["effects"].tolist(), strict=True)),
    )


def _profile(work: Work, index: int, prompt: Prompt, probes: Sequence[int]) -> dict[str, Tensor]:
    def make() -> dict[str, Tensor]:
        profiler = Profiler(work.session, probes)
        steps = work.session.steps
        images = work.run(
            profiler, prompt, 1.25 * steps + len(probes) * len(work.session.sites) / 2
        )
        sketch = profiler.sketch()
        found = {"images": images, "outputs": sketch.outputs, "residuals": sketch.residuals}
        if probes:
            found["known"] = torch.stack(profiler.results)
            found["effects"] = torch.tensor([profiler.effects[step] for step in probes])
        return found

    return work.checkpoint.tensors(f"profile-{index}", make)


def _damages(work: Work, prompt: Prompt, target: Target, profile: _Profile) -> dict[int, float]:
    """Return the damage to the image when all sites are shared at one probe step alone."""
    session = work.session
    work.begin("probing how much each step matters")
    found: dict[int, float] = {}
    for step in profile.effects:

        def make(step: int = step) -> float:
            stepper = PlanStepper(
                work.variants,
                probe_rows(session, session.steps, step),
                list(profile.outputs[: step * session.layout.calls]),
            )
            images = work.run(stepper, prompt, float(session.steps - step + 1))
            dense = work.dense("calibration", 0, prompt)
            return float(
                np.mean([j.damage for j in judge_images(target, dense, images, prompt.call)])
            )

        found[step] = work.checkpoint.data(f"damage-{step}", make)
    return found


def _allowed(work: Work, prompts: Sequence[Prompt], target: Target) -> float:
    """Return the least damage that the target allows on a prompt; 0 if that is unknown."""
    found = [
        allowed
        for index, prompt in enumerate(prompts)
        for allowed in allowed_damages(
            target, work.dense("calibration", index, prompt), prompt.call
        )
    ]
    known = [allowed for allowed in found if allowed is not None]
    return max(0.0, min(known)) if len(known) == len(found) and known else 0.0


def _gentle(errors: ErrorTable, weights: Array) -> float:
    """Return the drift of sharing everything every other step."""
    repeated, steps = errors.by_strategy[Strategy.SHARE_STEP], range(1, errors.steps, 2)
    shared = [repeated[step, step - 1, 0] * weights[step] for step in steps]
    return float(np.sum(np.where(np.isfinite(shared), shared, 0.0)))
