"""Calibrate a plan of whole steps: the entry to the search, with its checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.matching import check_fingerprint
from ditfastattn.runtime.opaque import is_opaque
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import check_not_accelerated
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, argument_of
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.runtime.search.whole_steps.meter import Meter
from ditfastattn.runtime.search.whole_steps.record import Recorder, Request
from ditfastattn.runtime.search.whole_steps.search import (
    FITTED_ON,
    MOST_RUNS,
    SEARCHED_ON,
    WholeStepSearch,
)
from ditfastattn.runtime.search.whole_steps.subject import Subject, identify

log = logging.getLogger(__name__)

_PER_IMAGE = 7  # dense generations' worth of runs, in finding which steps run
_FITS, _CHECKS = 4, 3  # plans that are judged on the calibration prompts, and on the held-out ones


@dataclass(frozen=True)
class Options:
    """Hold what a search of whole steps is asked to do; see ``calibrate``."""

    target: Target
    cfg_layout: CfgLayout | None = None
    timestep: str = "timestep"
    seed: int = 0
    out: str | os.PathLike[str] | None = None
    restart: bool = False
    on_progress: Callable[[SearchProgress], None] | None = None
    opaque: bool = False  # leave the model's inside alone, even where it could be captured
    decides: Mapping[str, Any] = field(default_factory=dict)  # the result, besides all this


def calibrate_whole_steps(
    pipeline: Any, prompts: Sequence[Prompt], held_out: Sequence[Prompt], options: Options
) -> Plan:
    """Search the plan of the fewest runs that meets the target.

    Where fewer than eight prompts are given, they are repeated with new seeds.

    Raises:
        ConfigError: the pipeline or the target is not supported.
        TargetMissedError: no plan is fast enough.
    """
    target = options.target
    if target.kind not in (TargetKind.QUALITY, TargetKind.SPEEDUP):
        raise ConfigError(
            "whole steps are searched for a quality, or a speedup",
            where="calibrate(method='whole-steps')",
            got=target.describe(),
            remedy="for example Target.min_ssim(0.9)",
        )
    with searching(pipeline, prompts, held_out, options) as search:
        return _saved(search.run(), options)


def refit_whole_steps(
    pipeline: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
) -> Plan:
    """Return ``plan`` with coefficients fitted anew, for another guidance, scheduler or steps.

    At other numbers of steps those nearest to the plan's run.

    Raises:
        ConfigError: the model is not the plan's, or the pipeline is not supported.
        TargetMissedError: the worst prompt misses the target.
    """
    with searching(pipeline, prompts, held_out, options, plan) as search:
        return _saved(search.refit(plan), options)


@contextmanager
def searching(
    pipeline: Any,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
    plan: Plan | None = None,
) -> Generator[WholeStepSearch]:
    """Open a search with its checkpoint, which is discarded at the end; ``plan`` is refitted."""
    check_not_accelerated(transformer_of(pipeline, "calibrate(pipeline)"))
    layout = options.cfg_layout or detect_cfg_layout(pipeline, prompts[0].call, options.timestep)
    opaque = options.opaque or is_opaque(plan)
    subject = identify(pipeline, prompts[0], layout, options.timestep, opaque)
    if plan is not None:
        check_fingerprint(subject.identity, plan.model)
    request = Request(
        options.target,
        repeated(prompts, FITTED_ON),
        tuple(held_out),
        layout,
        options.timestep,
        options.seed,
    )
    path = None if options.out is None else Path(options.out)
    holding = nullcontext(Checkpoint()) if path is None else open_checkpoint(path, options.restart)
    with holding as checkpoint:
        kept = checkpoint if plan is None else Checkpoint()
        if kept.begin(_describe(subject, request) | dict(options.decides)):
            log.warning("ditfastattn: resuming the unfinished search beside %s", path)
        meter = Meter(_most_forwards(pipeline, request), options.on_progress)
        yield WholeStepSearch(pipeline, Recorder(subject, request, meter), kept)
        kept.discard()


def _saved(plan: Plan, options: Options) -> Plan:
    if options.out is not None:
        plan.save(options.out)
    return plan


def _most_forwards(pipeline: Any, request: Request) -> float:
    """Return about the most forward passes of one image that a search takes."""
    steps = argument_of(pipeline, request.prompts[0].call, "num_inference_steps") or 1
    images, unseen = len(request.prompts), len(request.held_out)
    judged = MOST_RUNS * (_FITS * images + _CHECKS * unseen)
    return float(steps * (images * 4 / 3 + unseen + SEARCHED_ON * _PER_IMAGE + judged))


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
