"""Measure a plan again, on prompts that its search has not seen: quality, drift and speed.

Each prompt is generated from the same noise up to four ways: dense and planned, eager and compiled.
Every image is compared with the dense eager one, and the target is judged on the planned images as
they will run: compiled, where that was asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ditfastattn.core.choices import choice_named
from ditfastattn.core.errors import ConfigError, TargetMissedError
from ditfastattn.core.html import facts_table
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.denoiser import denoiser_name, transformer_of
from ditfastattn.runtime.pipeline.forwards import check_not_accelerated
from ditfastattn.runtime.pipeline.guidance import (
    check_layout,
    detect_cfg_layout,
    guidance_of,
    scale_argument,
)
from ditfastattn.runtime.pipeline.prompts import Prompt, argument_of, split_prompts
from ditfastattn.runtime.pipeline.sampler import check_sampler
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.judge.drift import Drift, mean_squared_error
from ditfastattn.runtime.search.judge.quality import Quality, compare
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.runtime.search.measure.timing import PairedTiming, measure_pairs
from ditfastattn.runtime.search.record.planned_target import target_of

DEFAULT_SEED = 2000  # searches begin at 0, and hold out from 500 on
DEFAULT_REPETITIONS = 10
_SPEEDS = (TargetKind.SPEEDUP, TargetKind.LATENCY)


@dataclass(frozen=True)
class Validation:
    """Hold what was measured of a plan.

    Attributes:
        target: the target that the plan must meet, if any.
        seeds: the seeds of the prompts, in order.
        qualities: the target's metric first, where it has one; SSIM where the images are large
            enough; PSNR.
        drift: where the difference to the dense eager images comes from.
        timing: generations in pairs, dense against planned; None where they were not timed.
        lowering: what ran the planned images that were compared, and the timed ones.
        reference: the dense eager images, an entry per prompt.
        planned: the planned images that were compared with them.
    """

    target: Target | None
    seeds: tuple[int, ...]
    qualities: tuple[Quality, ...]
    drift: Drift
    timing: PairedTiming | None
    lowering: Lowering
    reference: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    planned: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    @property
    def reached(self) -> float | None:
        """Return what the target judges: the worst image's value, or the median speed."""
        if self.target is None or self.target.kind is TargetKind.THRESHOLD:
            return None
        if self.target.kind is TargetKind.QUALITY:
            return self.qualities[0].worst
        assert self.timing is not None
        speedup = self.target.kind is TargetKind.SPEEDUP
        return self.timing.speedup.median if speedup else self.timing.candidate.median

    @property
    def met(self) -> bool | None:
        """Return whether the worst image meets the target; None where there is none to check."""
        reached = self.reached
        return None if self.target is None or reached is None else self.target.met_by(reached)

    def _repr_html_(self) -> str:
        """Return what was measured as a notebook shows it."""
        rows = [
            (each.label, f"mean {each.mean:.4g}{each.unit}, worst {each.worst:.4g}{each.unit}")
            for each in self.qualities
        ]
        rows.append(("drift", self.drift.describe()))
        if self.timing is not None:
            rows.append(("speedup", f"{self.timing.speedup.median:.2f}x"))
        if self.target is not None and self.met is not None:
            rows.append((self.target.describe(), "met" if self.met else "missed"))
        return facts_table([("prompts", str(len(self.seeds))), *rows])

    def require(self) -> None:
        """Raise an error if the target is missed.

        Raises:
            TargetMissedError: it is missed.
        """
        if self.target is None or self.met is not False:
            return
        raise TargetMissedError(
            "the plan misses the target",
            where=self.target.describe(),
            got=f"{self.reached:.4g}, on {len(self.seeds)} prompts",
            expected=f"{self.target.bound:g}",
            remedy="calibrate a new plan for this target, on prompts like these",
        )


def validate(
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    *,
    target: Target | None = None,
    speed: bool = True,
    lowering: Lowering = Lowering.INDUCTOR,
    repetitions: int = DEFAULT_REPETITIONS,
    seed: int = DEFAULT_SEED,
    timestep: str = "timestep",
    on_progress: Callable[[str], None] | None = None,
) -> Validation:
    """Measure ``plan`` on the prompts of ``call``, and return what was found.

    A missed target is not an error here: see ``Validation.require``.

    Args:
        pipeline: the diffusers pipeline that the plan is for.
        plan: the plan.
        call: the keyword arguments of a generation, with a list entry per image. Steps and
            guidance are the plan's.
        target: what the plan must meet; its own target where None.
        speed: also compile and time generations.
        lowering: what runs them. With ``eager`` nothing is compiled, and the speed means little.
        repetitions: the least number of pairs to time; each prompt is timed.
        seed: seeds the prompts' noise: ``seed``, ``seed + 1``, ...
        timestep: the name of the transformer's timestep argument.
        on_progress: called with what is done next.

    Returns:
        Qualities per image, drift, and seconds per generation, dense and planned.

    Raises:
        ConfigError: the plan does not match the model, sampler or call, or the target cannot be
            measured.
    """
    lowering = choice_named(Lowering, lowering, "validate(lowering)")
    check_not_accelerated(transformer_of(pipeline, "validate(pipeline)"))
    wanted = target_of(plan) if target is None else target
    prompts = split_prompts(planned_call(pipeline, plan, call), seed)
    _check_request(wanted, speed, repetitions)
    if wanted is not None:
        wanted.prepare(prompts[0].call)
    report = on_progress or _ignore
    with _running_plain(pipeline), text_padded(pipeline, plan.text), many_compilations():
        if any(strategy.shares_guidance for row in plan.strategies for strategy in row):
            check_layout(plan, detect_cfg_layout(pipeline, prompts[0].call))
        pair = partial(_Pair, pipeline, plan, prompts, timestep)
        measured = _measure(pair, lowering if speed else None, repetitions, report)
    return Validation(
        target=wanted,
        seeds=tuple(prompt.seed for prompt in prompts),
        qualities=compare(wanted, prompts, measured.reference, measured.planned),
        drift=measured.drift,
        timing=measured.timing,
        lowering=lowering if speed else Lowering.EAGER,
        reference=tuple(measured.reference),
        planned=tuple(measured.planned),
    )


class _Pair:
    """Generate each prompt dense and planned, both by one code generator."""

    def __init__(
        self,
        pipeline: Any,
        plan: Plan,
        prompts: Sequence[Prompt],
        timestep: str,
        lowering: Lowering,
    ) -> None:
        self.dense = dense_contender(pipeline, prompts, lowering)
        self.planned = planned_contender(pipeline, plan, prompts, lowering, timestep)
        self._least, self._lowering = len(prompts), lowering

    def time(self, repetitions: int, report: Callable[[str], None]) -> PairedTiming:
        """Warm both up, and time them in turns, each prompt at least once."""
        doing = "compiling" if self._lowering is Lowering.INDUCTOR else "warming up"
        report(f"{doing} the dense model")
        self.dense.warm_up()
        report(f"{doing} the plan")
        self.planned.warm_up()
        pairs = max(repetitions, self._least)
        report(f"timing {pairs} pairs of generations")
        return measure_pairs(self.dense.generate, self.planned.generate, pairs)


@dataclass(frozen=True)
class _Measured:
    """Hold images by prompt, dense eager ones and planned ones, and what was measured of them."""

    reference: list[Tensor]
    planned: list[Tensor]
    drift: Drift
    timing: PairedTiming | None


def _measure(
    pair: Callable[[Lowering], _Pair],
    timed: Lowering | None,
    repetitions: int,
    report: Callable[[str], None],
) -> _Measured:
    """Generate and compare; time generations run by ``timed``, unless None."""
    eager = pair(Lowering.EAGER)
    report("generating eager, planned and dense")
    planned = eager.planned.by_prompt()  # first, as it refuses a wrong model
    reference = eager.dense.by_prompt()
    drift = Drift(mean_squared_error(reference, planned))
    if timed is not Lowering.INDUCTOR:
        timing = None if timed is None else eager.time(repetitions, report)
        return _Measured(reference, planned, drift, timing)
    compiled = pair(timed)
    timing = compiled.time(repetitions, report)
    planned = compiled.planned.by_prompt()
    drift = Drift(
        drift.plan,
        mean_squared_error(reference, compiled.dense.by_prompt()),
        mean_squared_error(reference, planned),
    )
    return _Measured(reference, planned, drift, timing)


def planned_call(pipeline: Any, plan: Plan, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``call`` with the plan's steps and guidance, where the pipeline takes them.

    Raises:
        ConfigError: ``call``, or the pipeline's scheduler, has others than the plan.
    """
    sampler = plan.sampler
    scale = {scale_argument(pipeline, call): sampler.guidance_scale}
    planned = {"num_inference_steps": sampler.steps, **scale}
    known = inspect.signature(pipeline.__call__).parameters
    filled = {name: item for name, item in planned.items() if name in known and item is not None}
    filled |= call
    steps = argument_of(pipeline, filled, "num_inference_steps")
    if steps != sampler.steps and "strength" not in filled:  # of which a part of the steps is run
        raise ConfigError(
            "the plan is for another number of steps",
            where="plan.sampler.steps",
            got=steps,
            expected=sampler.steps,
            remedy="leave the steps to the plan, or adapt it to others (ditfastattn.retarget)",
        )
    check_sampler(plan, getattr(pipeline, "scheduler", None), guidance_of(pipeline, filled))
    return filled


def _check_request(target: Target | None, speed: bool, repetitions: int) -> None:
    if repetitions < 1:
        raise ConfigError(
            "there is nothing to time", where="repetitions", got=repetitions, expected="1 or more"
        )
    if target is not None and target.kind in _SPEEDS and not speed:
        raise ConfigError(
            "the target is a speed, but speed is not measured",
            where=target.describe(),
            remedy="measure the speed too, or choose a quality as the target",
        )


@contextmanager
def _running_plain(pipeline: Any) -> Generator[None]:
    """Run the pipeline with its transformer as it was before it was compiled."""
    name = denoiser_name(pipeline)
    around = getattr(pipeline, name)
    setattr(pipeline, name, transformer_of(pipeline, "validate(pipeline)"))
    try:
        yield
    finally:
        setattr(pipeline, name, around)


def _ignore(_phase: str) -> None:
    pass
