"""Calibrate a plan for a diffusers pipeline: the public entry to the searches."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import CacheDtype, Site
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan, Tried
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import HELD_OUT_SEED, Prompt, split_prompts
from ditfastattn.runtime.search.estimate import most_forwards, usual_forwards
from ditfastattn.runtime.search.global_chooser import make_global
from ditfastattn.runtime.search.joint.calibrate import calibrate_jointly
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.call_log import ChangingCallsError, SearchedPhase
from ditfastattn.runtime.search.measure.contender import measure_speed
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.methods import Chooser, Method, measured_costs
from ditfastattn.runtime.search.options import SearchOptions
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
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.search import Search
from ditfastattn.runtime.search.solve.window_choice import WindowForm, allowed_windows
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from ditfastattn.runtime.search.whole_steps.observe import UnobservableError

log = logging.getLogger(__name__)

DEFAULT_TARGET = Target.min_ssim(0.9)
NOTHING_GAINED = 1.02  # a speedup below this counts as none
_FIRST_BUDGET = {Method.GREEDY: 0.05, Method.PER_STEP: 0.05}
_REPETITIONS = 10


def calibrate(
    pipeline: Any,
    call: Mapping[str, Any],
    *,
    target: Target = DEFAULT_TARGET,
    held_out: Mapping[str, Any] | None = None,
    method: Method | str = Method.AUTO,
    objective: Objective | str = Objective.LATENCY,
    max_variants: int = 0,
    max_cache_mb: float = 0.0,
    cache_dtype: CacheDtype | str | None = None,
    attention_only: bool = False,
    head_groups: int = 1,
    windows: WindowForm | str = WindowForm.AUTO,
    cfg_layout: CfgLayout | None = None,
    seed: int = 0,
    timestep: str = "timestep",
    lowering: Lowering | str = Lowering.INDUCTOR,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> Plan:
    """Search the fastest plan that meets ``target``, and return it.

    Args:
        pipeline: a diffusers pipeline whose denoiser is ``pipeline.transformer``.
        call: the keyword arguments of a generation. Lists (prompts, classes) hold one entry per
            image: each is a calibration prompt. Steps, guidance and sizes fix what the plan is for.
        target: what the worst prompt must reach.
        held_out: like ``call``, other prompts to validate on; new seeds of ``call`` where None.
        method: ``global`` (sites, with one budget for all steps), ``per-step`` (DiTFastAttnV2's
            integer program), ``greedy`` (DiTFastAttn, Algorithm 1), ``whole-steps`` (which steps
            run at all; the output of the others is fitted, in any model), ``joint`` (whole steps,
            and sites within the steps that run; for a quality). ``auto`` is joint for a quality:
            whole steps alone where the model is not captured, global where whole steps cannot be
            searched. It is greedy for a threshold, and global for a speed or under a cap.
        objective: save measured ``latency``, or ``flops`` of all matrix products or of attention
            alone (``attention-flops``), which need no measurement.
        max_variants: the most distinct step variants; 0 is no cap.
        max_cache_mb: the most MiB that the caches of one image take at any time; 0 is no cap.
        cache_dtype: keep caches in ``float16`` or ``bfloat16``, in half the memory of a model's
            fp32; what they hold is rounded. In the model's own dtype where None.
        attention_only: leave feed-forwards as they are, as the ``greedy`` and ``per-step`` methods
            always do.
        head_groups: how many groups to split the heads of each attention into; each group takes
            its own strategies (DiTFastAttnV2's head-wise attention). At most the number of heads;
            1 leaves attentions whole.
        windows: a ``band`` of the flattened sequence (the paper's), ``tiles`` of the token grid,
            or of the sequence where no grid is known, or ``auto``: whatever measures better at
            each site for the ``global`` method, bands for the others.
        cfg_layout: how guidance branches reach the transformer; observed where None.
        seed: seeds the prompts' noise: ``seed``, ``seed + 1``, ...
        timestep: the name of the transformer's timestep argument.
        lowering: what runs the plan when a speed is measured.
        out: the plan's file, written at the end. The search keeps its state beside it, and resumes
            if it was interrupted.
        restart: forget an unfinished search.
        on_progress: called with what the search does and how long it may take.

    Returns:
        The plan, with the record of its search in ``plan.calibration``. Where nothing can be gained
        it is full everywhere, and a warning says so.

    Raises:
        ConfigError: the pipeline, the call or an option is not supported.
        TargetMissedError: no plan reaches the target.
    """
    prompts = split_prompts(call, seed)
    unseen = split_prompts(held_out or call, seed + HELD_OUT_SEED)
    resolved = _resolve(Method(method), target, bool(max_variants or max_cache_mb))
    _check_cap("max_variants", max_variants, resolved)
    _check_cap("max_cache_mb", max_cache_mb, resolved)
    _check_head_groups(head_groups)
    options = SearchOptions(
        target=target,
        method=Method.GLOBAL if resolved is Method.AUTO else resolved,
        objective=Objective(objective),
        max_variants=max_variants,
        max_cache_bytes=int(max_cache_mb * 2**20),
        lowering=Lowering(lowering),
        seed=seed,
    )
    target.prepare(prompts[0].call)
    wanted = Options(target, cfg_layout, timestep, seed, out, restart, on_progress)
    if resolved is Method.WHOLE_STEPS:
        return calibrate_whole_steps(pipeline, prompts, unseen, wanted)
    narrow = attention_only or not _searches_all_sites(resolved)
    sites = _SitesWanted(
        narrow, head_groups, _window_form(WindowForm(windows), resolved), cache_dtype
    )
    if resolved in (Method.AUTO, Method.JOINT):
        try:
            return _search_jointly(pipeline, prompts, unseen, options, sites, wanted, resolved)
        except UnobservableError as error:
            if resolved is Method.JOINT:
                raise
            log.warning("ditfastattn: whole steps cannot be searched, only sites: %s", error.reason)
            missing = Tried(what="whole steps", outcome=f"not possible: {error.reason}")
            wanted = replace(wanted, tried=(missing,))
    opening = _open(pipeline, prompts[0], cfg_layout, timestep, sites)
    try:
        return _search_sites(pipeline, call, prompts, unseen, options, opening, wanted)
    except ChangingCallsError as error:
        return _search_phases(pipeline, call, prompts, unseen, options, sites, wanted, error)


def _search_jointly(
    pipeline: Any,
    prompts: Sequence[Prompt],
    unseen: Sequence[Prompt],
    options: SearchOptions,
    sites: _SitesWanted,
    wanted: Options,
    method: Method,
) -> Plan:
    """Search whole steps, and strategies of ``sites`` at the steps that run."""
    decides = {name: str(item) for name, item in asdict(sites).items()}
    plan = calibrate_jointly(
        pipeline,
        prompts,
        unseen,
        replace(wanted, decides=decides),
        _open(pipeline, prompts[0], wanted.cfg_layout, wanted.timestep, sites),
        options.objective,
        else_whole=method is Method.AUTO,
    )
    _warn_if_nothing_gained(plan)
    return plan


def _search_sites(
    pipeline: Any,
    call: Mapping[str, Any],
    prompts: Sequence[Prompt],
    unseen: Sequence[Prompt],
    options: SearchOptions,
    opening: AbstractContextManager[Session],
    wanted: Options,
) -> Plan:
    """Search strategies of the sites of the session that is ``opening``."""
    path = None if wanted.out is None else Path(wanted.out)
    holding = nullcontext(Checkpoint()) if path is None else open_checkpoint(path, wanted.restart)
    with holding as checkpoint, opening as session:
        work = Work(session, checkpoint, 0.0, wanted.on_progress)
        resumed = checkpoint.begin(search_request(session, call, prompts, unseen, options))
        if resumed:
            log.warning("ditfastattn: resuming the unfinished search beside %s", path)
        work.at_most = most_forwards(session, options, len(prompts), len(unseen))
        work.expected = usual_forwards(session, options, len(prompts), len(unseen))
        plan = _search(work, options, Prompt(call, options.seed), prompts, unseen)
        plan = with_tried(plan, *wanted.tried)
        if path is not None:
            plan.save(path)
        checkpoint.discard()
    _warn_if_nothing_gained(plan)
    return plan


def _search_phases(
    pipeline: Any,
    call: Mapping[str, Any],
    prompts: Sequence[Prompt],
    unseen: Sequence[Prompt],
    options: SearchOptions,
    sites: _SitesWanted,
    wanted: Options,
    refused: ChangingCallsError,
) -> Plan:
    """Search each phase of a generation that changes its guidance, the others dense; join them.

    A form of window holds for all phases, so it is a band unless tiles are asked for.

    Raises:
        ConfigError: the calls change otherwise, or the options cannot be met phase by phase.
    """
    phases = observe_phases(pipeline, prompts[0], wanted.cfg_layout, wanted.timestep, refused)
    share = share_of_target(options.target, len(phases.spans), refused)
    if options.max_variants:
        raise ConfigError(
            "variants cannot be capped where guidance changes within a generation",
            where="calibrate(max_variants)",
            got=phases.described,
            remedy="leave max_variants out",
        )
    if sites.windows is WindowForm.AUTO:
        sites = replace(sites, windows=WindowForm.BAND)
    each = replace(options, target=share)
    found: list[Plan | None] = []
    for only, (steps, layout) in zip(phases.searched, phases.spans, strict=True):
        if len(steps) < 2:
            found.append(None)
            continue
        log.info("calibrate: the phase at steps %d-%d: guidance %s", steps[0], steps[-1], layout)
        opening = _open(pipeline, prompts[0], layout, wanted.timestep, sites, only)
        alone = replace(wanted, out=None, tried=())
        found.append(_search_sites(pipeline, call, prompts, unseen, each, opening, alone))
    plan = join_phases(phases, found, options.target, refused)
    plan = keep_if_met(pipeline, plan, options.target, prompts, unseen, wanted.timestep)
    plan = with_tried(plan, *wanted.tried)
    if wanted.out is not None:
        plan.save(wanted.out)
    return plan


@dataclass(frozen=True)
class _SitesWanted:
    """Say which sites of a model may take which shortcuts, and in what their caches are kept."""

    attention_only: bool
    head_groups: int
    windows: WindowForm
    cache_dtype: CacheDtype | str | None


@contextmanager
def _open(
    pipeline: Any,
    prompt: Prompt,
    cfg_layout: CfgLayout | None,
    timestep: str,
    wanted: _SitesWanted,
    only: SearchedPhase | None = None,
) -> Generator[Session]:
    """Open a session whose sites are as ``wanted``."""
    narrow, groups = wanted.attention_only, wanted.head_groups
    with open_session(pipeline, prompt, cfg_layout, timestep, narrow, groups, only) as session:
        _check_steps(session.steps)
        device = session.example[0].device.type
        sites = allowed_windows(session.sites, wanted.windows, device)
        session.take_sites(_with_caches_in(wanted.cache_dtype, session, sites))
        yield session


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


def _resolve(method: Method, target: Target, capped: bool) -> Method:
    """Return the method; it stays ``auto`` where whole steps and sites are to be searched."""
    threshold = target.kind is TargetKind.THRESHOLD
    if method is Method.AUTO:
        if target.kind is TargetKind.QUALITY and not capped:
            return Method.AUTO
        return Method.GREEDY if threshold else Method.GLOBAL
    if method is Method.GLOBAL and threshold:
        raise ConfigError(
            "a threshold bounds the model's output at each step; the global search has none",
            where="calibrate(method)",
            got=method,
            expected="greedy or per-step",
            remedy="ask for a quality or a speed, or choose another method",
        )
    return method


def _window_form(windows: WindowForm, method: Method) -> WindowForm:
    auto = windows is WindowForm.AUTO
    return WindowForm.BAND if auto and not _searches_all_sites(method) else windows


def _searches_all_sites(method: Method) -> bool:
    """Return whether ``method`` chooses for feed-forwards too, and between forms of windows."""
    return method in (Method.AUTO, Method.GLOBAL, Method.JOINT)


def _check_cap(name: str, most: float, method: Method) -> None:
    if most < 0 or (most and method is not Method.GLOBAL):
        raise ConfigError(
            "the plan cannot be capped like this",
            where=f"calibrate({name})",
            got=f"{most} with method {method}",
            expected="a positive number with the global method, or 0 for no cap",
        )


def _with_caches_in(
    dtype: CacheDtype | str | None, session: Session, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """Return ``sites`` with caches kept in ``dtype``, which must be narrower than the model's."""
    if dtype is None:
        return tuple(sites)
    made = tuple(site.with_caches_in(CacheDtype(dtype)) for site in sites)
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


def _check_steps(count: int) -> None:
    if count < 2:
        raise ConfigError(
            "a generation of one step has nothing to reuse",
            where="calibrate(call)",
            got=f"{count} step",
            expected="2 steps or more: a plan reuses what earlier steps have computed",
            remedy="give the call more steps, by num_inference_steps, sigmas or strength",
        )


def _check_head_groups(count: int) -> None:
    if count < 1:
        raise ConfigError(
            "the heads cannot be grouped like this",
            where="calibrate(head_groups)",
            got=count,
            expected="the number of groups per attention; 1 leaves attentions whole",
        )


def _warn_if_nothing_gained(plan: Plan) -> None:
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
