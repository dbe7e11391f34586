"""Search what sites do: in all steps of a generation, or phase by phase where guidance changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditfastattn.core.choices import choice_named
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import CacheDtype, Site
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.pipeline.sampler import check_steps
from ditfastattn.runtime.search.cache_memory import say_what_caches_take
from ditfastattn.runtime.search.estimate import most_forwards, usual_forwards
from ditfastattn.runtime.search.global_chooser import make_global
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.call_log import ChangingCallsError, SearchedPhase
from ditfastattn.runtime.search.measure.contender import measure_speed
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.methods import Chooser, Method, measured_costs
from ditfastattn.runtime.search.options import DEFAULT_TARGET, SearchOptions
from ditfastattn.runtime.search.pass_chooser import PassChooser
from ditfastattn.runtime.search.phases import (
    join_phases,
    keep_if_met,
    observe_phases,
    share_of_target,
)
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.record_plan import with_tried
from ditfastattn.runtime.search.record.request import search_request
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.search import Search
from ditfastattn.runtime.search.solve.window_choice import WindowForm, allowed_windows
from ditfastattn.runtime.search.whole_steps.calibrate import Options

log = logging.getLogger(__name__)

NOTHING_GAINED = 1.02  # a speedup below this counts as none
_FIRST_BUDGET = {Method.GREEDY: 0.05, Method.PER_STEP: 0.05}
_REPETITIONS = 10


@dataclass(frozen=True)
class SitesWanted:
    """Say which sites of a model may take which shortcuts, and in what their caches are kept."""

    attention_only: bool
    head_groups: int
    windows: WindowForm
    cache_dtype: CacheDtype | str | None

    @property
    def in_phases(self) -> SitesWanted:
        """Return the same in a phase: a form of window holds for all phases, so none is chosen."""
        auto = self.windows is WindowForm.AUTO
        return replace(self, windows=WindowForm.BAND) if auto else self


@contextmanager
def open_sites(
    pipeline: Any,
    prompt: Prompt,
    cfg_layout: CfgLayout | None,
    timestep: str,
    wanted: SitesWanted,
    only: SearchedPhase | None = None,
) -> Generator[Session]:
    """Open a session whose sites are as ``wanted``."""
    narrow, groups = wanted.attention_only, wanted.head_groups
    with open_session(pipeline, prompt, cfg_layout, timestep, narrow, groups, only) as session:
        if only is None:
            check_steps(session.steps)
        device = session.example[0].device.type
        sites = allowed_windows(session.sites, wanted.windows, device)
        session.take_sites(_with_caches_in(wanted.cache_dtype, session, sites))
        yield session


@dataclass(frozen=True)
class SiteRequest:
    """Say what strategies of sites are searched for.

    Attributes:
        call: one call of the pipeline, of all calibration prompts.
        prompts: those of ``call``.
        unseen: the held-out ones.
        options: the target, and how it is searched.
        wanted: where the plan goes, and who is told of progress.
    """

    call: Mapping[str, Any]
    prompts: Sequence[Prompt]
    unseen: Sequence[Prompt]
    options: SearchOptions
    wanted: Options


def search_sites(request: SiteRequest, opening: AbstractContextManager[Session]) -> Plan:
    """Search strategies of the sites of the session that is ``opening``."""
    prompts, unseen = request.prompts, request.unseen
    options, wanted = request.options, request.wanted
    path = None if wanted.out is None else Path(wanted.out)
    holding = nullcontext(Checkpoint()) if path is None else open_checkpoint(path, wanted.restart)
    with holding as checkpoint, opening as session:
        say_what_caches_take(session, options.max_cache_bytes)
        work = Work(session, checkpoint, 0.0, wanted.on_progress)
        resumed = checkpoint.begin(search_request(session, request.call, prompts, unseen, options))
        if resumed:
            log.warning("ditfastattn: resuming the unfinished search beside %s", path)
        work.at_most = most_forwards(session, options, len(prompts), len(unseen))
        work.expected = usual_forwards(session, options, len(prompts), len(unseen))
        plan = _search(work, options, Prompt(request.call, options.seed), prompts, unseen)
        plan = wanted.saved(with_tried(plan, *wanted.tried))
        checkpoint.discard()
    warn_if_nothing_gained(plan)
    return plan


def search_phases(
    pipeline: Any, request: SiteRequest, sites: SitesWanted, refused: ChangingCallsError
) -> Plan:
    """Search each phase of a generation that changes its guidance, the others dense; join them.

    A form of window holds for all phases, so it is a band unless tiles are asked for.

    Raises:
        ConfigError: the calls change otherwise, or the options cannot be met phase by phase.
    """
    prompts, unseen = request.prompts, request.unseen
    options, wanted = request.options, request.wanted
    phases = observe_phases(pipeline, prompts[0], wanted.cfg_layout, wanted.timestep, refused)
    share = share_of_target(options.target, len(phases.spans), refused)
    if options.max_variants:
        raise ConfigError(
            "variants cannot be capped where guidance changes within a generation",
            where="calibrate(max_variants)",
            got=phases.described,
            remedy="leave max_variants out",
        )
    alone = replace(
        request,
        options=replace(options, target=share),
        wanted=replace(wanted, out=None, tried=()),
    )
    found: list[Plan | None] = []
    for only, (steps, layout) in zip(phases.searched, phases.spans, strict=True):
        if len(steps) < 2:
            found.append(None)
            continue
        log.info("calibrate: the phase at steps %d-%d: guidance %s", steps[0], steps[-1], layout)
        opening = open_sites(pipeline, prompts[0], layout, wanted.timestep, sites.in_phases, only)
        found.append(search_sites(alone, opening))
    plan = join_phases(phases, found, options.target, refused)
    plan = keep_if_met(pipeline, plan, options.target, prompts, unseen, wanted.timestep)
    return wanted.saved(with_tried(plan, *wanted.tried))


def _search(
    work: Work,
    options: SearchOptions,
    batch: Prompt,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> Plan:
    began = time.monotonic()
    search = Search(work, _chooser(work, options, batch, prompts), options, prompts, held_out)
    if options.target.kind is TargetKind.QUALITY:
        found, timing = search.quality(), None
    elif options.target.kind is TargetKind.THRESHOLD:
        found, timing = search.threshold(), None
    else:
        session = work.session

        def measure(plan: Plan) -> Any:
            session.release()
            try:
                return measure_speed(
                    session.pipeline,
                    plan,
                    held_out,
                    options.lowering,
                    _REPETITIONS,
                    session.timestep,
                )
            finally:
                session.hold()

        found, timing = search.speed(measure)
    return search.plan(found, time.monotonic() - began, timing)


def _chooser(
    work: Work, options: SearchOptions, batch: Prompt, prompts: Sequence[Prompt]
) -> Chooser:
    if options.method is Method.GLOBAL:
        judge = options.target
        if judge.kind is not TargetKind.QUALITY:
            judge = DEFAULT_TARGET  # a speed does not define damage
        most, most_bytes = options.max_variants, options.max_cache_bytes
        return make_global(work, prompts, judge, options.objective, most, most_bytes)
    if work.session.layout.calls == 2:
        raise ConfigError(
            "this method needs guidance in one call of the transformer",
            where="calibrate(method)",
            got=f"{options.method}, with two calls per step",
            expected=Method.GLOBAL,
            remedy="set a quality or a speed as the target, and the method to `global`",
        )
    (costs,) = measured_costs(work, options.objective)
    return PassChooser(work, batch, costs, options.method, _FIRST_BUDGET[options.method])


def _with_caches_in(
    dtype: CacheDtype | str | None, session: Session, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """Return ``sites`` with caches kept in ``dtype``, which must be narrower than the model's."""
    if dtype is None:
        return tuple(sites)
    kept = choice_named(CacheDtype, dtype, "calibrate(cache_dtype)")
    made = tuple(site.with_caches_in(kept) for site in sites)
    own = {value(find(session.captured.module.graph, site.node)).dtype for site in sites}
    if all(site.kept_dtype(item) == item for site in made for item in own):
        raise ConfigError(
            "caches would take as much memory as in the model's own dtype",
            where="calibrate(cache_dtype)",
            got=f"{dtype}, for a model that computes in "
            + ", ".join(str(item).removeprefix("torch.") for item in own),
            remedy="leave cache_dtype out",
        )
    return made


def warn_if_nothing_gained(plan: Plan) -> None:
    """Warn of a plan that saves next to nothing."""
    speedup = plan.calibration.measured_speedup or plan.calibration.predicted_speedup or 1.0
    if speedup >= NOTHING_GAINED:
        return
    entries = len(plan.sites) * plan.sampler.steps
    log.warning(
        "ditfastattn: there was nothing to gain: %d of %d entries of the plan take a shortcut, "
        "for a predicted speedup of %.2fx: at this target the model is not redundant",
        plan.changed,
        entries,
        speedup,
    )
