"""``ditfastattn bisect``: the first rewrite of a plan that breaks a target."""

from __future__ import annotations

from dataclasses import asdict

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.search.judge.validate import DEFAULT_SEED
from ditfastattn.runtime.search.record.planned_target import target_of
from ditfastattn.tools.bisect import Bisection, bisect_plan
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Device,
    Dtype,
    Json,
    LowerBound,
    MaxFeatureDistance,
    MaxFlip,
    MaxLpips,
    MetricName,
    MinClipScore,
    MinPsnr,
    MinSsim,
    NoiseSeed,
    PipelineName,
    PlanFile,
    Prompts,
    UpperBound,
)
from ditfastattn.tools.commands.target import chosen_target
from ditfastattn.tools.terminal import open_console, print_json, spinner


def bisect(
    plan: PlanFile,
    pipeline: PipelineName = "",
    classes: Classes = "3",
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
    metric: MetricName = "",
    at_least: LowerBound = None,
    at_most: UpperBound = None,
    seed: NoiseSeed = DEFAULT_SEED,
    as_json: Json = False,
) -> None:
    """Find the first rewrite of a plan that breaks a target: a site at a step, by bisection.

    The target is the one the plan was searched for, unless another is given. Nothing is compiled.
    """
    loaded = Plan.load(plan)
    given = chosen_target(
        min_ssim=min_ssim,
        min_psnr=min_psnr,
        max_lpips=max_lpips,
        max_flip=max_flip,
        max_feature_distance=max_feature_distance,
        min_clip_score=min_clip_score,
        metric=metric,
        at_least=at_least,
        at_most=at_most,
    )
    target = given or target_of(loaded)
    if target is None:
        raise ConfigError(
            "the plan records no target",
            where=str(plan),
            remedy="give one, such as --min-ssim 0.95",
        )
    opened = open_pipeline(pipeline, dtype, device)
    arguments = Generation(call=call).arguments(opened, classes, prompts)
    console = open_console(stderr=as_json)
    with spinner(console, "starting") as show:
        found = bisect_plan(opened, loaded, arguments, target, seed, show)
    console.print(describe(found), soft_wrap=True)
    if as_json:
        print_json(asdict(found))


def describe(found: Bisection) -> str:
    """Return what was found, in a sentence or two."""
    whole = f"the whole plan reaches {found.reached:.4g}; target: {found.target}"
    culprit = found.culprit
    if culprit is None:
        return f"no rewrite breaks the target: {whole}"
    return (
        f"step {culprit.step}, {culprit.site}: {culprit.strategy} breaks the target: "
        f"{culprit.before:.4g} without this step's rewrites, {culprit.after:.4g} with its first "
        f"{culprit.rewrites}; {whole}"
    )
