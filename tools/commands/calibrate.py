"""``ditfastattn calibrate``: search for a plan, or adapt one to other steps or another size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ditfastattn
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.options import DEFAULT_TARGET
from ditfastattn.runtime.search.solve.window_choice import WindowForm
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.interrupts import resumable
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Compiler,
    Device,
    Dtype,
    Guidance,
    Json,
    LowerBound,
    MaxFeatureDistance,
    MaxFlip,
    MaxLatency,
    MaxLpips,
    MaxVariants,
    MetricName,
    MinClipScore,
    MinPsnr,
    MinSpeedup,
    MinSsim,
    PipelineName,
    Prompts,
    ReportFile,
    Restart,
    Seed,
    Steps,
    Threshold,
    UpperBound,
)
from ditfastattn.tools.commands.search_output import print_outcome, search_progress
from ditfastattn.tools.commands.target import chosen_target
from ditfastattn.tools.terminal import open_console, print_json, spinner

Out = Annotated[Path, typer.Option(help="File to write the plan to.")]
HeldOut = Annotated[str, typer.Option(help="Classes to validate the plan on.")]
HeldOutPrompts = Annotated[
    Path | None,
    typer.Option(help="Prompts to validate the plan on. Default: --prompts with new seeds."),
]
HowToChoose = Annotated[
    Method,
    typer.Option(help="What is searched. auto, for a quality: whole steps, and sites within them."),
]
WhatToSave = Annotated[Objective, typer.Option(help="What to save.")]
MaxCacheMb = Annotated[
    float, typer.Option(min=0.0, help="Most MiB of caches for one image. 0: no cap.")
]
StoredAs = Annotated[
    CacheDtype | None, typer.Option(help="Dtype of the caches. Default: the model's.")
]
AttentionOnly = Annotated[bool, typer.Option(help="Leave the feed-forward layers unchanged.")]
HeadGroups = Annotated[
    int,
    typer.Option(min=1, help="Groups of heads with strategies of their own. 1: no groups."),
]
Windows = Annotated[
    WindowForm,
    typer.Option(help="A band of the sequence, tiles of the grid, or per site the better."),
]
TextLength = Annotated[
    int,
    typer.Option(
        min=0,
        help="Pad texts to so many tokens, for pipelines that do not (Qwen-Image). 0: leave them.",
    ),
]
Retarget = Annotated[
    Path | None,
    typer.Option(help="Adapt this plan to the given steps or resolution, and validate it."),
]


def calibrate(
    out: Out = Path("plan.json"),
    pipeline: PipelineName = "",
    classes: Classes = "0,3,5,8",
    held_out: HeldOut = "1,4,6,9",
    prompts: Prompts = None,
    held_out_prompts: HeldOutPrompts = None,
    steps: Steps = 20,
    guidance: Guidance = None,
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
    threshold: Threshold = None,
    metric: MetricName = "",
    at_least: LowerBound = None,
    at_most: UpperBound = None,
    method: HowToChoose = Method.AUTO,
    objective: WhatToSave = Objective.LATENCY,
    max_variants: MaxVariants = 0,
    max_cache_mb: MaxCacheMb = 0.0,
    cache_dtype: StoredAs = None,
    attention_only: AttentionOnly = False,
    head_groups: HeadGroups = 1,
    windows: Windows = WindowForm.AUTO,
    text_length: TextLength = 0,
    lowering: Compiler = Lowering.INDUCTOR,
    seed: Seed = 0,
    restart: Restart = False,
    retarget: Retarget = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Search for the fastest plan that meets a target, and write it as JSON.

    An interrupted search resumes when the command is run again.
    """
    target = chosen_target(
        min_ssim=min_ssim,
        min_psnr=min_psnr,
        max_lpips=max_lpips,
        max_flip=max_flip,
        max_feature_distance=max_feature_distance,
        min_clip_score=min_clip_score,
        min_speedup=min_speedup,
        max_latency=max_latency,
        threshold=threshold,
        metric=metric,
        at_least=at_least,
        at_most=at_most,
    )
    loaded = open_pipeline(pipeline, dtype, device)
    generation = Generation(steps, guidance, call)
    seen = generation.arguments(loaded, classes, prompts)
    again = prompts is not None and held_out_prompts is None
    unseen = None if again else generation.arguments(loaded, held_out, held_out_prompts)
    console = open_console(stderr=as_json)
    with resumable("what was measured is kept"), search_progress(console) as show:
        if retarget is None:
            plan = ditfastattn.calibrate(
                loaded,
                seen,
                target=target or DEFAULT_TARGET,
                held_out=unseen,
                method=method,
                objective=objective,
                max_variants=max_variants,
                max_cache_mb=max_cache_mb,
                cache_dtype=cache_dtype,
                attention_only=attention_only,
                head_groups=head_groups,
                text_length=text_length,
                windows=windows,
                lowering=lowering,
                seed=seed,
                out=out,
                restart=restart,
                on_progress=show,
            )
        else:
            plan = ditfastattn.retarget(
                loaded,
                _plan_to_adapt(retarget, out),
                seen,
                target=target,
                held_out=unseen,
                seed=seed,
                out=out,
                on_progress=show,
            )
    print_outcome(console, plan)
    console.print(f"wrote {out}")
    if report is not None:
        from ditfastattn.tools.report.of_plan import search_report  # these load matplotlib
        from ditfastattn.tools.report.page import write_report

        with spinner(console, "examining the plan for the report"):
            write_report(search_report(loaded, plan, seen, seed), report)
        console.print(f"wrote {report}", soft_wrap=True)
    if as_json:
        print_json({"plan": str(out), "calibration": plan.calibration.model_dump(mode="json")})


def _plan_to_adapt(plan: Path, out: Path) -> Plan:
    if plan.resolve() == out.resolve():
        raise ConfigError(
            "the plan to adapt would be overwritten",
            where="--retarget and --out",
            got=plan,
            remedy="write the adapted plan to another file",
        )
    return Plan.load(plan)
