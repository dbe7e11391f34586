"""Adapt a plan to other steps, timesteps or a resolution, and measure whether it still holds.

What is redundant at a relative position of the trajectory is mostly redundant there at another
step count or size as well; but not always, so a retargeted plan is always measured.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from ditfastattn.core.errors import ConfigError, TargetMissedError
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.calibration import Calibration, Measured
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.matching import check_fingerprint, input_shapes
from ditfastattn.runtime.pipeline.prompts import HELD_OUT_SEED, Prompt, split_prompts
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.adapted_rows import as_planned, nearest, retarget_rows
from ditfastattn.runtime.search.joint.calibrate import Opening, open_phases
from ditfastattn.runtime.search.joint.parts import Part
from ditfastattn.runtime.search.joint.search import JointSearch
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.call_log import SearchedPhase
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.planned_target import record_target, record_values, target_of
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.solve.rows import Row
from ditfastattn.runtime.search.whole_steps.calibrate import (
    Options,
    prepare,
    refit_whole_steps,
)

log = logging.getLogger(__name__)


def retarget(
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    *,
    target: Target | None = None,
    held_out: Mapping[str, Any] | None = None,
    cfg_layout: CfgLayout | None = None,
    seed: int = 0,
    timestep: str = "timestep",
    out: str | os.PathLike[str] | None = None,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> Plan:
    """Return ``plan`` adapted to the generations of ``call``, if it still meets its target there.

    Args:
        pipeline: a diffusers pipeline with the plan's model, and any scheduler.
        plan: the plan to adapt.
        call: the keyword arguments of a generation, with a list entry per image; steps, guidance
            and sizes are those to adapt to.
        target: the quality to keep on the worst prompt; the plan's own where None.
        held_out: like ``call``, other prompts to validate on; new seeds of ``call`` where None.
        cfg_layout: how guidance branches reach the transformer; observed where None.
        seed: seeds the prompts' noise: ``seed``, ``seed + 1``, ...
        timestep: the name of the transformer's timestep argument.
        out: the new plan's file, written only where the target is met.
        on_progress: called with what is done, and how long it may take.

    Returns:
        The plan for the generations of ``call``.

    Raises:
        ConfigError: the model is not the plan's, or the target is not a quality.
        TargetMissedError: the worst prompt misses the target.
    """
    kept = _quality(target_of(plan) if target is None else target)
    prompts = split_prompts(call, seed)
    unseen = split_prompts(held_out or call, seed + HELD_OUT_SEED)
    kept.prepare(prompts[0].call)
    wanted = Options(kept, cfg_layout, timestep, seed, out, on_progress=on_progress)
    with text_padded(pipeline, plan.text):
        return _retargeted(pipeline, plan, prompts, unseen, wanted)


def _retargeted(
    pipeline: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    unseen: Sequence[Prompt],
    wanted: Options,
) -> Plan:
    """Adapt ``plan`` by what it has: whole steps, sites, or both."""
    kept, out = wanted.target, wanted.out
    if all(site.kind is SiteKind.OUTPUT for site in plan.sites):
        return refit_whole_steps(pipeline, plan, prompts, unseen, wanted)
    holding = nullcontext() if out is None else open_checkpoint(Path(out))  # one writer per plan
    narrow = all(site.kind is not SiteKind.FEED_FORWARD for site in plan.sites)

    def opening(
        layout: CfgLayout | None, only: SearchedPhase | None = None
    ) -> AbstractContextManager[Session]:
        groups = plan.head_groups
        return open_session(pipeline, prompts[0], layout, wanted.timestep, narrow, groups, only)

    if any(site.kind is SiteKind.OUTPUT for site in plan.sites):
        return _refitted(pipeline, plan, prompts, unseen, wanted, opening)
    with holding, opening(wanted.cfg_layout) as session:
        _check_model(plan, session)
        session.take_sites(as_planned(plan, session))
        at_most = 2.0 * session.steps * (len(prompts) + len(unseen))
        work = Work(session, Checkpoint(), at_most, wanted.on_progress)
        adapted = _validated(work, plan, kept, prompts, unseen, wanted.seed)
        if out is not None:
            adapted.save(out)
    return adapted


def _refitted(
    pipeline: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
    opening: Opening,
) -> Plan:
    """Adapt a plan of whole steps and sites: the steps that run stay, as do their shortcuts."""
    prepared = prepare(pipeline, prompts, held_out, options, plan)
    with ExitStack() as opened, prepared.searching() as whole:
        whole.generate_dense()  # before sessions hold the model
        steps, first = whole.steps, prepared.first
        parts: list[Part] = []
        rows: list[Row] = []
        sessions = open_phases(first, opening, opened)
        for session, (own, _) in zip(sessions, first.spans, strict=True):
            _check_model(plan, session)
            session.take_sites(as_planned(plan, session))
            rows += retarget_rows(plan, session, own.start, steps)
            parts.append(Part(own, Work(session, Checkpoint(), 0.0)))
        old = [plan.strategies[nearest(step, steps, plan.sampler.steps)] for step in range(steps)]
        runs = [step for step, row in enumerate(old) if row[-1].computes or step in first.begins]
        idle = (Strategy.SHARE_STEP,) * len(rows[0])
        rows = [row if step in runs else idle for step, row in enumerate(rows)]
        return options.saved(JointSearch(whole, parts).refit(rows, runs))


def _validated(
    work: Work,
    plan: Plan,
    target: Target,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    seed: int,
) -> Plan:
    """Adapt ``plan``, measure it, and return it with its record."""
    session, began = work.session, time.monotonic()
    rows = retarget_rows(plan, session)
    calibrated = _measured(work, rows, prompts, target, "calibration")
    unseen = _measured(work, rows, held_out, target, "held-out")
    calibration = Calibration(
        method="retarget",
        target=record_target(target),
        strength=plan.calibration.strength,
        seed=seed,
        calibrated=calibrated,
        held_out=unseen,
        forwards=round(work.forwards, 1),
        seconds=round(time.monotonic() - began, 1),
    )
    return record_plan(session, rows, work.timesteps, calibration, plan.merge_variants)


def _measured(
    work: Work, rows: Sequence[Row], prompts: Sequence[Prompt], target: Target, group: str
) -> Measured:
    """Return what the prompts of ``group`` measure of the plan ``rows``.

    Raises:
        TargetMissedError: the worst of them misses the target.
    """
    work.begin(f"measuring the {group} prompts")
    judged = [
        item.value
        for index, prompt in enumerate(prompts)
        for item in work.judge(group, index, rows, prompt, target)
    ]
    measured = record_values(target, judged)
    if target.met_by(measured.worst):
        return measured
    side = "below" if target.at_least else "above"
    raise TargetMissedError(
        "the retargeted plan misses the target",
        where=target.describe(),
        got=f"{measured.worst:.4g} on the worst {group} prompt, "
        f"{abs(measured.worst - target.bound):.3g} {side} the bound",
        expected=f"{target.bound:g}",
        remedy="calibrate a new plan for these steps and this resolution",
    )


def _quality(target: Target | None) -> Target:
    if target is not None and target.kind is TargetKind.QUALITY:
        return target
    fast = target is not None and target.kind in (TargetKind.SPEEDUP, TargetKind.LATENCY)
    raise ConfigError(
        "retarget validates a quality; run `ditfastattn validate` for the speed"
        if fast
        else "retarget validates a quality, and the plan was not searched for one",
        where="retarget(target)",
        got="no target" if target is None else target.describe(),
        expected="a quality, such as Target.min_ssim(0.9)",
        remedy="pass the quality to keep (--min-ssim)",
    )


def _check_model(plan: Plan, session: Session) -> None:
    """Raise ``ConfigError`` unless the session's model is the plan's.

    Buffers such as position embeddings follow the resolution, and are among the weights that a
    fingerprint covers: where shapes differ, weights may.
    """
    got, expected = session.identity, plan.model
    resized = input_shapes(session.captured) != plan.inputs
    if resized and got.weights != expected.weights:
        log.warning(
            "ditfastattn: retarget: at other input shapes the weights cannot be compared with the "
            "plan's: make sure that the model is the same"
        )
        expected = expected.model_copy(update={"weights": got.weights})
    check_fingerprint(got, expected)
