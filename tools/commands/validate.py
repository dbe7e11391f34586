"""``ditfastattn validate``: measure a plan's quality, drift and speed on new prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import ditfastattn
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.judge.validate import DEFAULT_REPETITIONS, DEFAULT_SEED
from ditfastattn.runtime.search.record.planned_target import metric_bound
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Compiler,
    Device,
    Dtype,
    Json,
    LowerBound,
    MaxFeatureDistance,
    MaxFlip,
    MaxLatency,
    MaxLpips,
    MetricName,
    MinClipScore,
    MinPsnr,
    MinSpeedup,
    MinSsim,
    NoiseSeed,
    PipelineName,
    PlanFile,
    Prompts,
    ReportFile,
    UpperBound,
)
from ditfastattn.tools.commands.target import chosen_target
from ditfastattn.tools.commands.validation_output import show_validation, validation_json
from ditfastattn.tools.terminal import open_console, print_json, spinner

MeasureSpeed = Annotated[bool, typer.Option(help="Also compile and time generations.")]
Repetitions = Annotated[
    int, typer.Option(min=1, help="Timed generations of each model; every prompt is timed.")
]
Out = Annotated[Path | None, typer.Option(help="JSON file to write the measurements to.")]


def validate(
    plan: PlanFile,
    pipeline: PipelineName = "",
    classes: Classes = "0,1,2,3,4,5,6,7,8,9",
    prompts: Prompts = None,
    call: CallArguments = "",
    dtype: Dtype = "float32",
    device: Device = "",
    min_ssim: MinSsim = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    max_flip: MaxFlip = None,
    max_feature_distance: MaxFeatureDistance = None,
    min_clip_score: MinClipScore = None,
    min_speedup: MinSpeedup = None,
    max_latency: MaxLatency = None,
    metric: MetricName = "",
    at_least: LowerBound = None,
    at_most: UpperBound = None,
    speed: MeasureSpeed = True,
    lowering: Compiler = Lowering.INDUCTOR,
    repetitions: Repetitions = DEFAULT_REPETITIONS,
    seed: NoiseSeed = DEFAULT_SEED,
    out: Out = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Measure a plan's quality and speed on new prompts. Exit with 1 if it misses its target.

    The target is the one the plan was searched for, unless another is given.
    """
    loaded = Plan.load(plan)
    if metric and at_least is None and at_most is None:
        at_least, at_most = metric_bound(loaded)
    target = chosen_target(
        min_ssim=min_ssim,
        min_psnr=min_psnr,
        max_lpips=max_lpips,
        max_flip=max_flip,
        max_feature_distance=max_feature_distance,
        min_clip_score=min_clip_score,
        min_speedup=min_speedup,
        max_latency=max_latency,
        metric=metric,
        at_least=at_least,
        at_most=at_most,
    )
    opened = open_pipeline(pipeline, dtype, device)
    validate_plan(
        open_console(stderr=as_json),
        opened,
        loaded,
        Generation(call=call).arguments(opened, classes, prompts),
        target=target,
        speed=speed,
        lowering=lowering,
        repetitions=repetitions,
        seed=seed,
        out=out,
        report=report,
        as_json=as_json,
    )


def validate_plan(
    console: Console,
    pipeline: Any,
    plan: Plan,
    call: Mapping[str, Any],
    *,
    target: Target | None,
    speed: bool,
    lowering: Lowering,
    repetitions: int,
    seed: int,
    out: Path | None,
    report: Path | None = None,
    as_json: bool = False,
) -> None:
    """Measure ``plan`` on the prompts of ``call``; print and write the measurements.

    Raises:
        TargetMissedError: the plan misses the target.
    """
    with spinner(console, "starting") as show:
        found = ditfastattn.validate(
            pipeline,
            plan,
            call,
            target=target,
            speed=speed,
            lowering=lowering,
            repetitions=repetitions,
            seed=seed,
            on_progress=show,
        )
    show_validation(console, plan, found)
    if out is not None:
        write_text_atomically(out, json.dumps(validation_json(plan, found), indent=1) + "\n")
        console.print(f"wrote {out}", soft_wrap=True)
    if report is not None:
        from ditfastattn.tools.report.of_plan import validation_report  # these load matplotlib
        from ditfastattn.tools.report.page import write_report

        with spinner(console, "examining the plan for the report"):
            write_report(validation_report(pipeline, plan, call, found), report)
        console.print(f"wrote {report}", soft_wrap=True)
    if as_json:
        print_json(validation_json(plan, found))
    found.require()
