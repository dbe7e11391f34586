"""Calibrate a plan for a diffusers pipeline: the public entry to the searches."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from ditfastattn.core.choices import choice_named
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.plan.calibration import Tried
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import HELD_OUT_SEED, split_prompts
from ditfastattn.runtime.pipeline.text_padding import text_padded
from ditfastattn.runtime.search.joint.calibrate import calibrate_jointly
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.call_log import ChangingCallsError, SearchedPhase
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import DEFAULT_TARGET, SearchOptions
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.runtime.search.site_search import (
    SiteRequest,
    SitesWanted,
    open_sites,
    search_phases,
    search_sites,
    warn_if_nothing_gained,
)
from ditfastattn.runtime.search.solve.window_choice import WindowForm
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from ditfastattn.runtime.search.whole_steps.observed import UnobservableError

log = logging.getLogger(__name__)


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
    text_length: int = 0,
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
            searched. It is greedy for a threshold, and global for a speed or under a cap; for a
            speedup where guidance is on at some steps only, whole steps.
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
        text_length: pad the text to so many tokens, hidden by the transformer's mask, for pipelines
            whose text is as long as the prompt (Qwen-Image): the plan is then for all prompts up
            to that length. 0 leaves it as it is. A model whose output depends on the padding is
            refused.
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
    resolved = _resolve(
        choice_named(Method, method, "calibrate(method)"),
        target,
        bool(max_variants or max_cache_mb),
    )
    _check_cap("max_variants", max_variants, resolved)
    _check_cap("max_cache_mb", max_cache_mb, resolved)
    _check_head_groups(head_groups)
    options = SearchOptions(
        target=target,
        method=Method.GLOBAL if resolved is Method.AUTO else resolved,
        objective=choice_named(Objective, objective, "calibrate(objective)"),
        max_variants=max_variants,
        max_cache_bytes=int(max_cache_mb * 2**20),
        lowering=choice_named(Lowering, lowering, "calibrate(lowering)"),
        seed=seed,
    )
    target.prepare(prompts[0].call)
    wanted = Options(target, cfg_layout, timestep, seed, out, restart, on_progress)
    narrow = attention_only or not _searches_all_sites(resolved)
    sites = SitesWanted(
        narrow,
        head_groups,
        _window_form(choice_named(WindowForm, windows, "calibrate(windows)"), resolved),
        cache_dtype,
    )
    request = SiteRequest(call, prompts, unseen, options, wanted)
    free = method == Method.AUTO and not (max_variants or max_cache_mb)
    with text_padded(pipeline, text_length, check=True):
        return _search(pipeline, request, sites, resolved, free)


def _search(
    pipeline: Any, request: SiteRequest, sites: SitesWanted, method: Method, free: bool
) -> Plan:
    """Search by ``method``, ``auto`` where whole steps and sites are to be searched.

    If ``free``, another method may take its place where it has no plan with phases.
    """
    prompts, unseen, wanted = request.prompts, request.unseen, request.wanted
    if method is Method.WHOLE_STEPS:
        return calibrate_whole_steps(pipeline, prompts, unseen, wanted)
    if method in (Method.AUTO, Method.JOINT):
        try:
            return _search_jointly(pipeline, request, sites, method)
        except UnobservableError as error:
            if method is Method.JOINT:
                raise
            log.warning("ditfastattn: whole steps cannot be searched, only sites: %s", error.reason)
            missing = Tried(what="whole steps", outcome=f"not possible: {error.reason}")
            request = replace(request, wanted=replace(wanted, tried=(missing,)))
    opening = open_sites(pipeline, prompts[0], wanted.cfg_layout, wanted.timestep, sites)
    try:
        return search_sites(request, opening)
    except ChangingCallsError as error:
        if free and wanted.target.kind is TargetKind.SPEEDUP:
            log.warning(
                "ditfastattn: sites are not searched for a speed where guidance changes within a "
                "generation: whole steps are; the speedup is counted, not measured"
            )
            missing = Tried(what="sites", outcome="not possible for a speed: guidance changes")
            return calibrate_whole_steps(
                pipeline, prompts, unseen, replace(wanted, tried=(missing,))
            )
        return search_phases(pipeline, request, sites, error)


def _search_jointly(
    pipeline: Any, request: SiteRequest, sites: SitesWanted, method: Method
) -> Plan:
    """Search whole steps, and strategies of ``sites`` at the steps that run."""
    prompts, wanted = request.prompts, request.wanted
    decides = {name: str(item) for name, item in asdict(sites).items()}

    def opening(layout: CfgLayout, only: SearchedPhase | None) -> AbstractContextManager[Session]:
        alike = sites if only is None else sites.in_phases
        return open_sites(pipeline, prompts[0], layout, wanted.timestep, alike, only)

    plan = calibrate_jointly(
        pipeline,
        prompts,
        request.unseen,
        replace(wanted, decides=decides),
        opening,
        request.options.objective,
        else_whole=method is Method.AUTO,
    )
    warn_if_nothing_gained(plan)
    return plan


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


def _check_head_groups(count: int) -> None:
    if count < 1:
        raise ConfigError(
            "the heads cannot be grouped like this",
            where="calibrate(head_groups)",
            got=count,
            expected="the number of groups per attention; 1 leaves attentions whole",
        )
