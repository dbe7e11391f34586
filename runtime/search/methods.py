"""Turn a strength into a plan: the three ways to choose strategies.

``global`` measures once and then makes any plan at no cost; ``per-step`` and ``greedy`` run a
generation for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ditfastattn.passes.plan.strategies import Strategy, names_of, strategies, strategy_named
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.error_table import ErrorTable, error_table
from ditfastattn.runtime.search.measure.latency import CostTable, Objective, measure_costs
from ditfastattn.runtime.search.measure.profile import Profiler, Sketch
from ditfastattn.runtime.search.measure.sensitivity import probe_rows, probe_steps, site_weights
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import PlanStepper
from ditfastattn.runtime.search.measure.window_choice import (
    choose_windows,
    chosen_sites,
    with_chosen,
)
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.budget import within_budget
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator, Progress
from ditfastattn.runtime.search.solve.memory import within_memory
from ditfastattn.runtime.search.solve.per_step import PerStepCalibrator
from ditfastattn.runtime.search.solve.problem import Problem, Row
from ditfastattn.runtime.search.solve.variants import capped_within_budget

PROFILED = 2  # prompts whose errors are measured; the others only judge
# The worst prompt's damage at a drift of 1, to begin with. On the demo model the mean prompt's was
# 0.16 to 0.22 and the worst of eight's 0.31 to 0.56, over plans of 1.6x to 2x.
_WORST_DAMAGE = 0.5


class Method(StrEnum):
    """Name how strategies are chosen."""

    AUTO = "auto"  # greedy for a threshold, else global
    GLOBAL = "global"
    PER_STEP = "per-step"
    GREEDY = "greedy"


class Chooser(Protocol):
    """Make plans of any strength; stronger is faster and worse."""

    @property
    def costs(self) -> CostTable:
        """Return the price of each strategy at each site."""
        ...

    @property
    def first(self) -> float:
        """Return the strength to begin with."""
        ...

    @property
    def order(self) -> float:
        """Return the power of the strength that damage goes with, roughly."""
        ...

    @property
    def tries(self) -> int:
        """Return how many plans may be made in looking for one."""
        ...

    @property
    def predicts(self) -> bool:
        """Tell whether plans are made without running the model."""
        ...

    def rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength."""
        ...


def measured_costs(work: Work, objective: Objective) -> tuple[CostTable, ...]:
    """Return the price of each strategy at each site, for each form of window."""
    work.begin("measuring the latency of each strategy")

    def make() -> list[dict[str, Any]]:
        found = measure_costs(work.variants, objective)
        work.spend(6.0 * len(strategies()))
        return [
            {
                "step": table.step,
                "sites": [{s.name: price for s, price in prices.items()} for prices in table.sites],
                "residual": table.residual,
            }
            for table in found
        ]

    return tuple(map(_read_costs, work.checkpoint.data("costs", make)))


def _read_costs(data: dict[str, Any]) -> CostTable:
    return CostTable(
        step=data["step"],
        # An interrupted search may be older than a strategy, and has no price for it.
        sites=tuple(
            {s: float(site.get(s.name, "inf")) for s in strategies()} for site in data["sites"]
        ),
        residual=tuple(data["residual"]),
    )


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
        return rows


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
    probes = probe_steps(session.steps)
    sketches: list[Sketch] = []
    effects: dict[int, list[float]] = {}
    known: Tensor | None = None
    for index, prompt in enumerate(prompts[:PROFILED]):
        work.begin(f"profiling prompt {index + 1}")
        found = _profile(work, index, prompt, probes if index == 0 else ())
        work.keep_dense("calibration", index, found["images"])
        sketches.append(Sketch(found["outputs"], found["residuals"]))
        if index == 0:
            known = found["known"]
            effects = dict(zip(probes, found["effects"].tolist(), strict=True))
    assert known is not None
    prices = measured_costs(work, objective)
    errors = [
        error_table(sketches, session.sites, session.layout, form) for form in range(len(prices))
    ]
    damages = _damages(work, prompts[0], target, known, probes)
    weights = site_weights(errors[0], effects, damages)
    allowed = _allowed(work, prompts, target)
    pairs = zip(errors, prices, strict=True)
    problems = [Problem(table, weights, costs) for table, costs in pairs]
    first = math.sqrt(allowed / _WORST_DAMAGE) if allowed else _gentle(errors[0], weights)
    problem = problems[0]
    if len(problems) > 1 and first > 0.0:
        chosen = choose_windows(problems, first)
        session.take_sites(chosen_sites(session.sites, chosen))
        problem = with_chosen(problems, chosen)

    def cache_bytes(rows: Sequence[Row]) -> int:
        programs = work.variants.programs(rows, most > 0)
        return sum(program.slots.peak_bytes for program in programs)

    return GlobalChooser(problem, first, most, max_cache_bytes, cache_bytes)


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


def _damages(
    work: Work, prompt: Prompt, target: Target, known: Tensor, probes: Sequence[int]
) -> dict[int, float]:
    """Return the damage to the image when all sites are shared at one probe step alone."""
    session = work.session
    work.begin("probing how much each step matters")
    found: dict[int, float] = {}
    for step in probes:

        def make(step: int = step) -> float:
            stepper = PlanStepper(
                work.variants,
                probe_rows(session, session.steps, step),
                list(known[: step * session.layout.calls]),
            )
            images = work.run(stepper, prompt, float(session.steps - step + 1))
            dense = work.dense("calibration", 0, prompt)
            return float(np.mean([j.damage for j in target.judge(dense, images, prompt.call)]))

        found[step] = work.checkpoint.data(f"damage-{step}", make)
    return found


def _allowed(work: Work, prompts: Sequence[Prompt], target: Target) -> float:
    """Return the least damage that the target allows on a prompt, 0 where it cannot tell."""
    found = [
        allowed
        for index, prompt in enumerate(prompts)
        for allowed in target.allowed_damages(work.dense("calibration", index, prompt), prompt.call)
    ]
    known = [allowed for allowed in found if allowed is not None]
    return max(0.0, min(known)) if len(known) == len(found) and known else 0.0


def _gentle(errors: ErrorTable, weights: Any) -> float:
    """Return the drift of sharing everything every other step."""
    repeated, steps = errors.by_strategy[Strategy.SHARE_STEP], range(1, errors.steps, 2)
    shared = [repeated[step, step - 1, 0] * weights[step] for step in steps]
    return float(np.sum(np.where(np.isfinite(shared), shared, 0.0)))


@dataclass
class PassChooser:
    """Choose strategies by a progressive pass: ``greedy`` (V1) or ``per-step`` (V2).

    The pass runs all calibration prompts as the one batch ``batch``.
    """

    work: Work
    batch: Prompt
    costs: CostTable
    method: Method
    first: float
    tries: int = 6
    order: float = 1.0
    predicts: bool = False

    def rows(self, strength: float) -> list[Row]:
        """Run a pass at this threshold or budget."""
        checkpoint = self.work.checkpoint
        name = f"{self.method}-pass-{strength:.9g}"
        rows: list[Row] = [tuple(map(strategy_named, row)) for row in checkpoint.peek(name) or ()]
        session = self.work.session
        if len(rows) == session.steps:
            return rows
        known = list(rows)

        def keep(row: Row) -> None:
            rows.append(row)
            checkpoint.put(name, names_of(rows))

        self.work.begin(f"a {self.method} pass at strength {strength:.3g}")
        before, layout, timestep = self.work.forwards, session.layout, session.timestep
        images = len(split_prompts(self.batch.call, self.batch.seed))
        opening = open_session(
            session.pipeline, self.batch, layout, timestep, True, session.head_groups
        )
        with opening as batched:
            if self.method is Method.GREEDY:

                def report(progress: Progress) -> None:
                    self.work.spend(before + images * progress.done - self.work.forwards)

                greedy = GreedyCalibrator(
                    batched.captured,
                    batched.sites,
                    layout,
                    strength,
                    session.steps,
                    report,
                    known,
                    keep,
                )
                batched.run(greedy, self.batch)
            else:
                per_step = PerStepCalibrator(batched, self.costs, strength, known, keep)
                batched.run(per_step, self.batch)
                self.work.spend(2.0 * session.steps * images)
            self.work.note(batched.timesteps)
        return rows
