"""Calibrate a plan of whole steps and sites: the entry to the joint search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.calibration import Tried
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.global_chooser import make_global
from ditfastattn.runtime.search.joint.search import MORE_RUNS, ROUNDS, JointSearch
from ditfastattn.runtime.search.judge.image_judge import CALIBRATION
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.record.record_plan import with_tried
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.whole_steps.calibrate import Options, Prepared, prepare
from ditfastattn.runtime.search.whole_steps.observed import UnobservableError
from ditfastattn.runtime.search.whole_steps.search import WholeStepSearch
from ditfastattn.runtime.search.whole_steps.searched_masks import MOST_RUNS

_WHERE = "calibrate(method='joint')"


def calibrate_jointly(
    pipeline: object,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
    opening: AbstractContextManager[Session],
    objective: Objective,
    else_whole: bool = False,
) -> Plan:
    """Search the fastest plan that meets a quality, of whole steps and of sites.

    Args:
        pipeline: what is searched.
        prompts: the calibration prompts.
        held_out: other prompts, which decide.
        options: what is asked for.
        opening: opens a session with the sites that may take shortcuts.
        objective: what to save.
        else_whole: search whole steps alone where the model is not captured.

    Raises:
        UnobservableError: whole steps cannot be searched in this pipeline.
        ConfigError: the target is not a quality, or the model is not captured.
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
    if prepared.first.phases:
        raise UnobservableError("the same rows at each step", "guidance that changes")
    if prepared.captured:
        with opening as session:
            return _searched(prepared, session, objective)
    if not else_whole:
        raise ConfigError(
            "sites can be searched in a captured model only",
            where=_WHERE,
            got="a model that is called as it is; the log says why",
            remedy="search whole steps alone: method='whole-steps'",
        )
    with prepared.searching() as whole:
        plan = with_tried(
            whole.run(), Tried(what="sites", outcome="not possible: the model is not captured")
        )
        return options.saved(plan)


def _searched(prepared: Prepared, session: Session, objective: Objective) -> Plan:
    """Search whole steps while ``session`` does not hold the model, then sites within it."""
    options = prepared.options
    with prepared.searching() as whole:
        session.release()
        try:
            whole.meter.at_most += _more_forwards(whole)
            start = whole.fewest()
            dense = whole.generate_dense()
        finally:
            session.hold()
        work = Work(session, whole.checkpoint, 0.0, _reported(whole))
        for index, images in enumerate(dense):
            work.keep_dense(CALIBRATION, index, images)
        chooser = make_global(work, whole.request.prompts, options.target, objective)
        plan = JointSearch(whole, work).run(start, chooser)
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
