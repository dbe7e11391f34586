"""Calibrate a plan of whole steps and sites: the entry to the joint search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.calibration import Tried
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.global_chooser import make_global
from ditfastattn.runtime.search.joint.parts import Part
from ditfastattn.runtime.search.joint.search import MORE_RUNS, ROUNDS, JointSearch
from ditfastattn.runtime.search.judge.image_judge import CALIBRATION
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.call_log import SearchedPhase, searched_phases
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.record.record_plan import with_tried
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.whole_steps.calibrate import Options, Prepared, prepare
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.search import WholeStepSearch
from ditfastattn.runtime.search.whole_steps.searched_masks import MOST_RUNS

_WHERE = "calibrate(method='joint')"

# Returns a session of the phase of this layout, of the whole generation where that has no phases.
Opening = Callable[[CfgLayout, SearchedPhase | None], AbstractContextManager[Session]]


def calibrate_jointly(
    pipeline: object,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
    opening: Opening,
    objective: Objective,
    else_whole: bool = False,
) -> Plan:
    """Search the fastest plan that meets a quality, of whole steps and of sites.

    Args:
        pipeline: what is searched.
        prompts: the calibration prompts.
        held_out: other prompts, which decide.
        options: what is asked for.
        opening: opens a session with the sites that may take shortcuts, in one phase.
        objective: what to save.
        else_whole: search whole steps alone where the model is not captured.

    Raises:
        UnobservableError: whole steps cannot be searched in this pipeline.
        ConfigError: the target is not a quality, or sites cannot be searched.
    """
    if options.target.kind is not TargetKind.QUALITY:
        raise ConfigError(
            "whole steps and sites are searched jointly for a quality",
            where=_WHERE,
            got=options.target.describe(),
            remedy="for example Target.min_ssim(0.9), or search one of both for a speed",
        )
    decides = {"method": "joint", "objective": objective, **options.decides}
    prepared = prepare(pipeline, prompts, held_out, replace(options, decides=decides))
    several = [steps for steps, _ in prepared.first.spans if len(steps) > 1]
    missing = "" if several else "no two steps in a row are guided alike"
    missing = missing if prepared.captured else "the model is not captured"
    if not missing:
        with ExitStack() as opened:
            return _searched(prepared, open_phases(prepared.first, opening, opened), objective)
    if not else_whole:
        raise ConfigError(
            "sites cannot be searched in this pipeline",
            where=_WHERE,
            got=f"{missing}; the log may say why",
            remedy="search whole steps alone: method='whole-steps'",
        )
    with prepared.searching() as whole:
        plan = with_tried(whole.run(), Tried(what="sites", outcome=f"not possible: {missing}"))
        return options.saved(plan)


def open_phases(first: Observed, opening: Opening, opened: ExitStack) -> list[Session]:
    """Open a session for each phase of the generation ``first``; none holds the model.

    They are closed with ``opened``.
    """
    phases: Sequence[SearchedPhase | None] = (None,)
    if first.phases:
        phases = searched_phases(first.spans)
    sessions: list[Session] = []
    for only, (_, layout) in zip(phases, first.spans, strict=True):
        sessions.append(opened.enter_context(opening(layout, only)))
        sessions[-1].release()
    return sessions


def _searched(prepared: Prepared, sessions: Sequence[Session], objective: Objective) -> Plan:
    """Search whole steps, then sites within them: those of each phase in its own session."""
    options, spans = prepared.options, prepared.first.spans
    with prepared.searching() as whole:
        whole.meter.at_most += _more_forwards(whole)
        start = whole.fewest()
        dense = whole.generate_dense()
        parts: list[Part] = []
        for number, (session, (steps, _)) in enumerate(zip(sessions, spans, strict=True)):
            kept = whole.checkpoint.part(f"phase-{number}") if number else whole.checkpoint
            work = Work(session, kept, 0.0, _reported(whole))
            for index, images in enumerate(dense):
                work.keep_dense(CALIBRATION, index, images)
            chooser = None
            if len(steps) > 1:
                with session.holding():
                    prompts = whole.request.prompts
                    chooser = make_global(work, prompts, options.target, objective)
            else:
                work.note(session.timesteps)
            parts.append(Part(steps, work, chooser))
        plan = JointSearch(whole, parts).run(start)
        return options.saved(plan)


def _reported(whole: WholeStepSearch) -> Callable[[SearchProgress], None]:
    """Return what adds the progress of measuring sites to that of the search."""
    before = whole.meter.forwards

    def report(progress: SearchProgress) -> None:
        whole.meter.forwards = before + progress.done
        whole.meter.begin(progress.phase)

    return report


def _more_forwards(whole: WholeStepSearch) -> float:
    """Return about the most forward passes of one image that sites add to a search."""
    images = len(whole.request.prompts) + len(whole.request.held_out)
    steps = len(whole.observed[0].steps)
    measured = 5.0 * steps + 60.0  # profiles, probes and prices
    return measured + len(MORE_RUNS) * ROUNDS * images * steps * MOST_RUNS
