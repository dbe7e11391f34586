"""What faults are injected into: a tiny pipeline, two plans, and what its images must be."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import ditfastattn
from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.export.tensorrt.build import build
from ditfastattn.export.tensorrt.job import Job
from ditfastattn.export.tensorrt.options import BuildOptions
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.pipeline.prompts import as_images, generate, split_prompts
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.runtime.tensorrt.engines import Layout
from ditfastattn.runtime.tensorrt.library import Library
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from ditfastattn.tools.digits_recipe import MODEL_CONFIG

CALL: dict[str, Any] = {"class_labels": [3], "num_inference_steps": 4, "guidance_scale": 2.0}
_WAITS = 300  # for a worker to end, of a tenth of a second
_SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16}


@dataclass(frozen=True)
class _Targets:
    """Stand in for TensorRT's names of targets."""

    SM89: int = 0


@dataclass(frozen=True)
class _Module:
    ComputeCapability: Any


_PLAYED = Library("played", _Module(_Targets), "1")


def subject() -> DigitsPipeline:
    """Return an untrained pipeline whose every layer matters to its images."""
    torch.manual_seed(0)
    config: dict[str, Any] = MODEL_CONFIG | _SIZES
    model = DiTTransformer2DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    pipeline = DigitsPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def plan_of(pipeline: Any, strategy: Strategy) -> Plan:
    """Return a plan that takes ``strategy`` at each second step, wherever it is legal."""
    prompt = split_prompts(CALL, 0)[0]
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        rows = [
            tuple(
                Strategy.FULL if step % 2 == 0 or why_not(strategy, site) else strategy
                for site in session.sites
            )
            for step in range(CALL["num_inference_steps"])
        ]
        return record_plan(session, rows, session.timesteps, Calibration(method="manual"))


def image_of(pipeline: Any) -> Tensor:
    """Return the image of one generation."""
    return as_images(generate(pipeline, split_prompts(CALL, 0)[0]))


def image_by_bundle(pipeline: Any, folder: Path) -> Tensor:
    """Return the image that the bundle in ``folder`` makes."""
    original = pipeline.transformer
    pipeline.transformer = ditfastattn.load(folder, threads=1)
    try:
        return image_of(pipeline)
    finally:
        pipeline.transformer = original


def image_by_plan(pipeline: Any, path: Path) -> Tensor:
    """Return the image that the plan in ``path`` makes."""
    plan = Plan.load(path)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    try:
        return image_of(pipeline)
    finally:
        ditfastattn.restore(pipeline)


def calibrated(pipeline: Any, out: Path) -> Plan:
    """Search a plan."""
    return ditfastattn.calibrate(
        pipeline,
        CALL,
        target=Target.min_psnr(12.0),
        method="greedy",
        objective="flops",
        lowering="eager",
        out=out,
    )


def built(folder: Path) -> None:
    """Build "engines" of a bundle, all but the builder being real."""

    def run(job: Job, *_: object) -> None:
        try:
            job.log.write_text("VERBOSE: nothing\n")
            job.engine.write_bytes(job.graph.read_bytes()[:100])
        except OSError as error:  # as the worker's is reported
            raise EngineError(f"the builder failed: {error}") from error

    module = sys.modules[build.__module__]
    with (
        patch.object(module, "run_job", run),
        patch.object(module, "find_library", lambda name: _PLAYED),
    ):
        build(folder, BuildOptions("sm89"))


def built_by_tensorrt(folder: Path) -> None:
    """Build engines of a bundle; wait for a worker that a killed build has left."""
    for _ in range(_WAITS):
        try:
            build(folder, BuildOptions("sm89", Layout.VARIANTS, library="tensorrt_rtx"))
        except ConfigError as error:
            if "another build" not in str(error):
                raise
            time.sleep(0.1)
        else:
            return
    raise EngineError("the worker of a killed build does not end")


def outcome(work: Callable[[], Any], right: Callable[[Any], bool]) -> str:
    """Return "survived" for an error of ours or a ``right`` result, else "raw" or "wrong"."""
    try:
        found = work()
    except (ConfigError, EngineError):
        return "survived"
    except Exception:  # whatever is not an error of ours
        return "raw"
    return "survived" if right(found) else "wrong"
