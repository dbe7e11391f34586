"""Calibrate a plan of whole steps: the entry to the search, with its checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.pipeline.denoiser import check_not_accelerated, transformer_of
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.runtime.search.whole_steps.meter import Meter
from ditfastattn.runtime.search.whole_steps.search import FITTED_ON, Request, WholeStepSearch
from ditfastattn.runtime.search.whole_steps.subject import Subject, identify

log = logging.getLogger(__name__)

_DENSE_GENERATIONS = 5.0  # that finding which steps run takes, per image that is looked at


def calibrate_whole_steps(
    pipeline: Any,
    target: Target,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    cfg_layout: CfgLayout | None = None,
    timestep: str = "timestep",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    on_progress: Callable[[SearchProgress], None] | None = None,
    opaque: bool = False,
) -> Plan:
    """Search the plan of the fewest runs that meets ``target``; arguments as of ``calibrate``.

    Where fewer than eight prompts are given, they are repeated with new seeds. ``opaque`` leaves
    the model's inside alone, even where it could be captured.

    Raises:
        ConfigError: the pipeline or the target is not supported.
        TargetMissedError: no plan is fast enough.
    """
    if target.kind not in (TargetKind.QUALITY, TargetKind.SPEEDUP):
        raise ConfigError(
            "whole steps are searched for a quality, or a speedup",
            where="calibrate(method='whole-steps')",
            got=target.describe(),
            remedy="for example Target.min_ssim(0.9)",
        )
    check_not_accelerated(transformer_of(pipeline, "calibrate(pipeline)"))
    layout = cfg_layout or detect_cfg_layout(pipeline, prompts[0].call, timestep)
    subject = identify(pipeline, prompts[0], layout, timestep, opaque)
    fitted_on = repeated(prompts, FITTED_ON)
    request = Request(target, fitted_on, tuple(held_out), layout, timestep, seed)
    path = None if out is None else Path(out)
    holding = nullcontext(Checkpoint()) if path is None else open_checkpoint(path, restart)
    with holding as checkpoint:
        if checkpoint.begin(_describe(subject, request)):
            log.warning("ditfastattn: resuming the unfinished search beside %s", path)
        meter = Meter(0.0, on_progress)
        plan = WholeStepSearch(pipeline, subject, request, checkpoint, meter).run()
        if path is not None:
            plan.save(path)
        checkpoint.discard()
    return plan


def repeated(prompts: Sequence[Prompt], least: int) -> tuple[Prompt, ...]:
    """Return ``prompts``, and as many of them again, with new seeds, as make ``least``."""
    seed = max(prompt.seed for prompt in prompts)
    again = (
        replace(prompts[index % len(prompts)], seed=seed + 1 + index)
        for index in range(least - len(prompts))
    )
    return (*prompts, *again)


def _describe(subject: Subject, request: Request) -> dict[str, Any]:
    """Return, as JSON data, all that decides the result of a search."""
    target = request.target
    scheduler = subject.scheduler
    return {
        "model": subject.identity.model_dump(),
        "layout": request.layout,
        "prompts": [[repr(sorted(prompt.call.items())), prompt.seed] for prompt in request.prompts],
        "held_out": [[repr(sorted(p.call.items())), p.seed] for p in request.held_out],
        "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
        "target": f"{target.name} {'>=' if target.at_least else '<='} {target.bound:.12g}",
        "method": "whole-steps",
        "torch": torch.__version__,
    }
