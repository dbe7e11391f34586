"""Find the first rewrite of a plan that breaks a target, by fuel.

Fuel lets only the first sites of each step variant take their strategy. It is raised by bisection
until the images miss the target; then, with that fuel, ever more steps follow the plan, until they
miss it again. What is found is one site at one step, where errors grow with each shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditfastattn.core.env import UNLIMITED_FUEL, limited_fuel
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.nesting import idle_steps
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.matching import planned_sites
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, split_prompts
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.judge.judgement import judge_images
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.judge.validate import planned_call
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from ditfastattn.runtime.search.solve.rows import Row


@dataclass(frozen=True)
class Culprit:
    """Name the first rewrite that breaks the target, with the values before and after it.

    ``rewrites`` counts the shortcuts of that step's variant up to this one: the fuel.
    """

    step: int
    site: str
    strategy: str
    rewrites: int
    before: float
    after: float


@dataclass(frozen=True)
class Bisection:
    """Hold what the whole plan reaches, and the culprit; None where the plan meets the target."""

    target: str
    reached: float
    generations: int
    culprit: Culprit | None


def bisect_plan(
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    target: Target,
    seed: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Bisection:
    """Find the first rewrite of ``plan`` that breaks ``target`` on the prompts of ``call``.

    Raises:
        ConfigError: the target is not a quality, or the plan does not match the model.
    """
    if target.kind is not TargetKind.QUALITY:
        raise ConfigError(
            "only a quality can be broken by a rewrite",
            where="bisect(target)",
            got=target.describe(),
            expected="a quality, such as --min-ssim or --min-psnr",
        )
    prompts = split_prompts(planned_call(pipeline, plan, call), seed)
    layout, groups = plan.sampler.cfg_layout, plan.head_groups or 1
    with (
        text_padded(pipeline, plan.text),
        open_session(pipeline, prompts[0], layout, head_groups=groups) as session,
    ):
        known = planned_sites(plan, session.captured, session.sites, session.identity)
        session.take_sites(known)
        return _Bisecting(session, plan, prompts, target, on_progress).run()


class _Bisecting:
    """Bisect over fuel, then over steps."""

    def __init__(
        self,
        session: Session,
        plan: Plan,
        prompts: Sequence[Prompt],
        target: Target,
        report: Callable[[str], None],
    ) -> None:
        self._session, self._plan, self._target, self._report = session, plan, target, report
        self._prompts = prompts
        report("dense generations")
        self._dense = [self._images(DenseStepper(session), prompt) for prompt in prompts]
        self._generations = len(prompts)

    def run(self) -> Bisection:
        rows, steps = self._plan.strategies, len(self._plan.strategies)
        idle = idle_steps(self._plan.sites, rows)
        shortcuts = [
            [place for place in _shortcuts(row) if step not in idle[place]]
            for step, row in enumerate(rows)
        ]
        most = max(map(len, shortcuts), default=0)
        reached = self._value(rows, UNLIMITED_FUEL)
        if self._target.met_by(reached):
            return Bisection(self._target.describe(), reached, self._generations, None)
        fuel = _first(most, lambda count: not self._target.met_by(self._value(rows, count)))
        dense_row = (Strategy.FULL,) * len(self._plan.sites)

        def until(count: int) -> list[Row]:
            return [*rows[:count], *(dense_row for _ in range(steps - count))]

        def breaks(count: int) -> bool:
            return not self._target.met_by(self._value(until(count), fuel))

        step = _first(steps, breaks) - 1
        before = self._value(until(step), fuel)
        after = self._value(until(step + 1), fuel)
        place = shortcuts[step][min(fuel, len(shortcuts[step])) - 1]
        site, strategy = self._plan.sites[place].name, rows[step][place].name
        culprit = Culprit(step, site, strategy, fuel, before, after)
        return Bisection(self._target.describe(), reached, self._generations, culprit)

    def _value(self, rows: Sequence[Row], fuel: int) -> float:
        """Return the worst image's value with ``fuel``."""
        self._report(f"{'all' if fuel < 0 else fuel} rewrites of each step")
        values: list[float] = []
        with limited_fuel(fuel):
            variants = Variants(self._session)
            for prompt, dense in zip(self._prompts, self._dense, strict=True):
                images = self._images(PlanStepper(variants, rows), prompt)
                self._generations += 1
                values += [
                    found.value for found in judge_images(self._target, dense, images, prompt.call)
                ]
        return self._target.worst(values)

    def _images(self, stepper: Any, prompt: Prompt) -> Tensor:
        return as_images(self._session.run(stepper, prompt))


def _shortcuts(row: Sequence[Strategy]) -> list[int]:
    return [index for index, strategy in enumerate(row) if strategy != Strategy.FULL]


def _first(most: int, breaks: Callable[[int], bool]) -> int:
    """Return the least count from 1 to ``most`` that breaks, where every greater one does."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if breaks(middle) else (middle, high)
    return high
