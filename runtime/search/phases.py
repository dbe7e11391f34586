"""Plans with phases: observe where guidance is on, and join the plans of the phases.

Each phase is searched as a generation of its own, while the others run dense: strategies begin anew
with each, so what one phase does changes nothing in another but its latents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.phases import Span, guided_layout, in_runs, phases_of, spans_of
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.guidance import (
    Arguments,
    copied,
    watching,
)
from ditfastattn.runtime.pipeline.guided_steps import layouts_at_steps
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.pipeline.sampler import counting_steps
from ditfastattn.runtime.search.judge.judgement import Judgement, judge_images
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.call_log import SearchedPhase, searched_phases
from ditfastattn.runtime.search.measure.contender import (
    Contender,
    dense_contender,
    planned_contender,
)
from ditfastattn.runtime.search.record.planned_target import record_target, record_values

log = logging.getLogger(__name__)


@dataclass
class _Step:
    """The calls of one step: rows, the first one's timestep, and the tensors of each."""

    timestep: float
    rows: list[int] = field(default_factory=list)
    calls: list[Arguments] = field(default_factory=list)


@dataclass(frozen=True)
class ObservedPhases:
    """What a dense generation has shown: its phases, and the timestep of each step."""

    layout: CfgLayout
    spans: tuple[Span, ...]
    timesteps: tuple[float, ...]
    described: str

    @property
    def searched(self) -> tuple[SearchedPhase, ...]:
        """Return each phase as what a search is of."""
        return searched_phases(self.spans)


def observe_phases(
    pipeline: Any, prompt: Prompt, layout: CfgLayout | None, timestep: str, refused: ConfigError
) -> ObservedPhases:
    """Generate ``prompt`` densely, and return the phases of its guidance.

    ``layout`` is that of the guided steps, observed where None.

    Raises:
        ConfigError: ``refused``, where the calls change otherwise than by guidance.
    """
    steps = _watch(pipeline, prompt, timestep)
    rows, calls = [tuple(step.rows) for step in steps], [step.calls for step in steps]
    layouts = layouts_at_steps(rows, calls, layout, timestep)
    if not layouts:
        raise refused
    warn_of_phases(layouts)
    guided, described = guided_layout(layouts), describe_layouts(layouts)
    spans = spans_of(len(steps), guided, phases_of(layouts))
    return ObservedPhases(guided, spans, tuple(step.timestep for step in steps), described)


def describe_layouts(layouts: Sequence[CfgLayout]) -> str:
    """Say at which steps guidance reaches the model how."""
    return in_runs([f"guidance {each}" for each in layouts])


def warn_of_phases(layouts: Sequence[CfgLayout]) -> None:
    """Say that a plan will have phases."""
    log.warning(
        "ditfastattn: guidance changes within a generation: the plan has phases: %s",
        describe_layouts(layouts),
    )


def _watch(pipeline: Any, prompt: Prompt, timestep: str) -> list[_Step]:
    """Return the steps of a dense generation; tensors are kept of the first step of each kind."""
    steps: list[_Step] = []
    known: set[tuple[int, ...]] = set()
    last = -1

    def look(given: Mapping[str, Any]) -> None:
        nonlocal last
        now = read_timestep(torch.as_tensor(given[timestep])).value()
        # Where the scheduler is not seen, a run of one timestep is a step.
        same = counted() == last if counted() else bool(steps) and now == steps[-1].timestep
        if not steps or not same:
            _forget_known(steps, known)
            steps.append(_Step(now))
        last = counted()
        kept = copied(given)
        steps[-1].rows.append(max(map(len, kept.values()), default=0))
        steps[-1].calls.append(kept)

    denoiser = transformer_of(pipeline, "calibrate(pipeline)")
    with watching(denoiser, look), counting_steps(pipeline) as counted:
        generate(pipeline, prompt)
    return steps


def _forget_known(steps: Sequence[_Step], known: set[tuple[int, ...]]) -> None:
    """Keep the tensors of the last step only if it is the first of its kind."""
    if steps:
        kind = tuple(steps[-1].rows)
        if kind in known:
            steps[-1].calls = []
        known.add(kind)


def share_of_target(target: Target, phases: int, refused: ConfigError) -> Target:
    """Return what each of so many ``phases`` must meet alone, for all of them to meet ``target``.

    A threshold is one of each step. Errors of phases add up as amplitudes, so each phase may do the
    damage of one part in ``phases`` squared.

    Raises:
        ConfigError: the target is not one of each phase.
    """
    if target.kind is TargetKind.THRESHOLD:
        return target
    if target.kind is TargetKind.QUALITY and (metric := target.metric) is not None:
        perfect = metric.perfect
        if perfect is not None and math.isinf(perfect):
            return replace(target, bound=target.bound + 20.0 * math.log10(phases))
        if perfect is not None:
            return replace(target, bound=perfect + (target.bound - perfect) / phases**2)
    raise ConfigError(
        f"{target.describe()} is not a target that phases can share",
        where="calibrate(target)",
        got="guidance that changes within a generation",
        expected="SSIM, PSNR, another metric with a known best value, or a threshold",
        remedy="choose such a target, search whole steps for a speed (method='whole-steps'), or "
        "guide all steps alike",
    ) from refused


def join_phases(
    phases: ObservedPhases, found: Sequence[Plan | None], target: Target, refused: ConfigError
) -> Plan:
    """Return the plan of all phases; None among those ``found`` is a single step, and dense.

    Raises:
        ConfigError: no phase has two steps, or they found different sites.
    """
    first = next((plan for plan in found if plan is not None), None)
    if first is None:
        raise refused
    rows: list[tuple[Strategy, ...]] = []
    for plan, (steps, _) in zip(found, phases.spans, strict=True):
        if plan is not None and (plan.sites, plan.inputs) != (first.sites, first.inputs):
            raise refused
        dense = ((Strategy.FULL,) * len(first.sites),) * len(steps)
        rows += dense if plan is None else plan.strategies
    known = [plan.calibration for plan in found if plan is not None]
    sampler = first.sampler.model_dump() | {
        "steps": len(rows),
        "timesteps": phases.timesteps,
        "cfg_layout": phases.layout,
        "phases": [{"steps": len(s), "cfg_layout": layout} for s, layout in phases.spans],
    }
    calibration = known[0].model_copy(
        update={
            "target": record_target(target),
            "strength": max(each.strength for each in known),
            "calibrated": None,
            "held_out": None,
            "cache_bytes": max(each.cache_bytes for each in known),
            "predicted_speedup": None,
            "rounds": sum(each.rounds for each in known),
            "forwards": sum(each.forwards for each in known),
            "seconds": sum(each.seconds for each in known),
        }
    )
    data = {**first.model_dump(), "sampler": sampler, "strategies": rows}
    return Plan.model_validate({**data, "calibration": calibration.model_dump()})


def keep_if_met(
    pipeline: Any,
    plan: Plan,
    target: Target,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    timestep: str,
) -> Plan:
    """Return ``plan`` with what all its phases together measure.

    Where they miss the target, only the phase with the most shortcuts stays; it alone has met more.
    """
    if target.kind is not TargetKind.QUALITY:
        return plan
    groups = [
        (some, dense_contender(pipeline, some, Lowering.EAGER)) for some in (prompts, held_out)
    ]
    judged = [_judged(pipeline, plan, target, *group, timestep) for group in groups]
    if not all(target.met_by(item.value) for group in judged for item in group):
        log.warning(
            "ditfastattn: the phases together miss %s: one of them stays", target.describe()
        )
        plan = _strongest_alone(plan)
        judged = [_judged(pipeline, plan, target, *group, timestep) for group in groups]
    calibrated, unseen = (record_values(target, [item.value for item in g]) for g in judged)
    measured = {"calibrated": calibrated, "held_out": unseen}
    return plan.model_copy(update={"calibration": plan.calibration.model_copy(update=measured)})


def _judged(
    pipeline: Any,
    plan: Plan,
    target: Target,
    prompts: Sequence[Prompt],
    dense: Contender,
    timestep: str,
) -> list[Judgement]:
    planned = planned_contender(pipeline, plan, prompts, Lowering.EAGER, timestep)
    with many_compilations():
        pairs = zip(prompts, dense.by_prompt(), planned.by_prompt(), strict=True)
        return [
            item
            for prompt, one, other in pairs
            for item in judge_images(target, one, other, prompt.call)
        ]


def _strongest_alone(plan: Plan) -> Plan:
    spans = [steps for steps, _ in plan.sampler.spans]
    changed = [
        sum(each is not Strategy.FULL for step in steps for each in plan.strategies[step])
        for steps in spans
    ]
    kept = spans[changed.index(max(changed))]
    full = (Strategy.FULL,) * len(plan.sites)
    rows = tuple(row if step in kept else full for step, row in enumerate(plan.strategies))
    return plan.model_copy(update={"strategies": rows})
