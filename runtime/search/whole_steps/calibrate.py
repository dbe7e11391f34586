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
from ditfastattn.passes.plan.calibration import Tried
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.matching import check_fingerprint
from ditfastattn.runtime.opaque import is_opaque
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import check_not_accelerated
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.hooks import check_not_cached
from ditfastattn.runtime.pipeline.prompts import Prompt, argument_of
from ditfastattn.runtime.pipeline.sampler import check_steps
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.phases import warn_of_phases
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.record_plan import with_tried
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.runtime.search.whole_steps.meter import Meter
from ditfastattn.runtime.search.whole_steps.observe import observe
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.record import Recorder, Request
from ditfastattn.runtime.search.whole_steps.ridge import LOOSER
from ditfastattn.runtime.search.whole_steps.search import FITTED_ON, WholeStepSearch
from ditfastattn.runtime.search.whole_steps.searched_masks import MOST_RUNS, SEARCHED_ON
from ditfastattn.runtime.search.whole_steps.subject import Subject, identify

log = logging.getLogger(__name__)

_PER_IMAGE = 7  # dense generations' worth of runs, in finding which steps run
_FITS = 10 + 2 * (1 + len(LOOSER))  # plans that are made on the calibration prompts, moves too
_CHECKS = 3  # of these, on the held-out ones


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
    tried: tuple[Tried, ...] = ()  # before

    def saved(self, plan: Plan) -> Plan:
        """Return ``plan``, written to its file if there is to be one."""
        if self.out is not None:
            plan.save(self.out)
        return plan


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
    with prepare(pipeline, prompts, held_out, options).searching() as search:
        return options.saved(with_tried(search.run(), *options.tried))


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
    with prepare(pipeline, prompts, held_out, options, plan).searching() as search:
        return options.saved(search.refit(plan))


@dataclass(frozen=True)
class Prepared:
    """Hold what a search of whole steps begins with; no file is written yet.

    Attributes:
        pipeline: what is searched.
        recorder: the model, and what is asked for.
        first: the dense generation of the first calibration prompt.
        options: of the search.
        refits: whether a plan is fitted anew, in one pass that is not resumed.
    """

    pipeline: Any
    recorder: Recorder
    first: Observed
    options: Options
    refits: bool

    @property
    def captured(self) -> bool:
        """Return whether the model is captured; else it is called as it is."""
        return self.recorder.subject.captured is not None

    def search(self, checkpoint: Checkpoint) -> WholeStepSearch:
        """Return the search, whose work is kept in ``checkpoint``."""
        return WholeStepSearch(self.pipeline, self.recorder, checkpoint, self.first)

    @contextmanager
    def searching(self) -> Generator[WholeStepSearch]:
        """Open the search with its checkpoint, which is discarded at the end."""
        options, recorder = self.options, self.recorder
        path = None if options.out is None else Path(options.out)
        holding = (
            nullcontext(Checkpoint()) if path is None else open_checkpoint(path, options.restart)
        )
        with holding as checkpoint:
            kept = Checkpoint() if self.refits else checkpoint
            decides = _describe(recorder.subject, recorder.request, self.first)
            if kept.begin(decides | dict(options.decides)):
                log.warning("ditfastattn: resuming the unfinished search beside %s", path)
            yield self.search(kept)
            kept.discard()


def prepare(
    pipeline: Any,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: Options,
    plan: Plan | None = None,
) -> Prepared:
    """Observe the first generation, and identify the model; ``plan`` is one to fit anew.

    Raises:
        UnobservableError: whole steps cannot be searched in this pipeline.
        ConfigError: the pipeline is not supported, or its model is not the plan's.
    """
    module = transformer_of(pipeline, "calibrate(pipeline)")
    check_not_accelerated(module)
    check_not_cached(module)
    layout = options.cfg_layout or detect_cfg_layout(pipeline, prompts[0].call, options.timestep)
    request = Request(
        options.target,
        repeated(prompts, FITTED_ON),
        tuple(held_out),
        layout,
        options.timestep,
        options.seed,
    )
    meter = Meter(_most_forwards(pipeline, request), options.on_progress)
    meter.begin("dense generations")
    first = observe(pipeline, prompts[0], layout, options.timestep)
    meter.spend(len(first.steps))
    check_steps(len(first.steps))
    if first.phases:
        warn_of_phases(first.layouts)
        request = replace(request, layout=first.layout)
    opaque = options.opaque or is_opaque(plan)
    subject = identify(pipeline, prompts[0], options.timestep, first, opaque)
    subject.sampler(first)  # refuses an unknown name of the timestep
    if plan is not None:
        check_fingerprint(subject.identity, plan.model)
    recorder = Recorder(subject, request, meter)
    return Prepared(pipeline, recorder, first, options, plan is not None)


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


def _describe(subject: Subject, request: Request, observed: Observed) -> dict[str, Any]:
    """Return, as JSON data, all that decides the result of a search."""
    target = request.target
    scheduler, text = subject.scheduler, subject.text
    return {
        "model": subject.identity.model_dump(),
        "layout": observed.layouts,
        "text": text and text.model_dump(),
        "prompts": [[repr(sorted(prompt.call.items())), prompt.seed] for prompt in request.prompts],
        "held_out": [[repr(sorted(p.call.items())), p.seed] for p in request.held_out],
        "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
        "target": f"{target.name} {'>=' if target.at_least else '<='} {target.bound:.12g}",
        "method": "whole-steps",
        "torch": torch.__version__,
    }
