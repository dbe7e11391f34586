"""Validating a plan: the target it must meet, on which images, and where drift comes from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from ditfastattn import (
    ConfigError,
    Plan,
    Strategy,
    Target,
    TargetMissedError,
    Validation,
    validate,
)
from ditfastattn.passes.plan.calibration import PlannedTarget
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.drift import Drift, decibels, mean_squared_error
from ditfastattn.runtime.search.record.planned_target import metric_bound, record_target, target_of
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.runtime.test_pipelines import Pipeline

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

F, S, W = Strategy.FULL, Strategy.SHARE_STEP, Strategy.WINDOW
CLASSES: dict[str, Any] = {"class_labels": [0, 1, 2]}
BUILT_IN = (
    Target.min_ssim(0.5),
    Target.min_psnr(20.0),
    Target.max_lpips(0.5),
    Target.min_clip_score(20.0),
    Target.min_speedup(1.5),
    Target.max_latency(2.0),
    Target.threshold(0.1),
)


def tiny_pipeline() -> DigitsPipeline:
    return tiny_digits_pipeline(DDIMScheduler(clip_sample=False))


def tiny_plan(*strategies: Strategy) -> Plan:
    call = {"class_labels": [0], "num_inference_steps": len(strategies), "guidance_scale": 2.0}
    return plan_for(tiny_pipeline(), call, strategies, Target.min_ssim(0.9))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny_plan(F, W, S, S)


def searched_for(target: PlannedTarget | None, plan: Plan) -> Plan:
    calibration = plan.calibration.model_copy(update={"target": target})
    return plan.model_copy(update={"calibration": calibration})


@pytest.fixture(scope="module")
def found(plan: Plan) -> Validation:
    return validate(tiny_pipeline(), plan, CLASSES, speed=False)


def test_the_plans_own_target_is_judged_on_new_seeds(plan: Plan, found: Validation) -> None:
    assert found.target == target_of(plan) == Target.min_ssim(0.9)
    assert found.seeds == (2000, 2001, 2002)
    ssim, psnr = found.qualities
    assert (ssim.name, psnr.name) == ("ssim", "psnr")
    assert len(ssim.values) == len(psnr.values) == 3
    assert ssim.worst == min(ssim.values) < ssim.mean < 1.0
    assert found.reached == ssim.worst
    assert found.timing is None


def test_the_values_are_those_of_the_plan_in_the_pipeline(plan: Plan, found: Validation) -> None:
    pipeline: Any = tiny_pipeline()
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    dense = pipeline([1], **call, generator=torch.Generator().manual_seed(2001)).images
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend="ditfastattn", options=options
    )
    planned = pipeline([1], **call, generator=torch.Generator().manual_seed(2001)).images
    expected = decibels(mean_squared_error([dense], [planned]))
    assert found.qualities[1].values[1] == pytest.approx(expected, rel=1e-4)


def test_the_worst_prompt_decides_not_the_mean(plan: Plan, found: Validation) -> None:
    ssim = found.qualities[0]
    between = Target.min_ssim((ssim.worst + ssim.mean) / 2.0)
    missed = validate(tiny_pipeline(), plan, CLASSES, target=between, speed=False)
    assert missed.qualities[0].mean > between.bound
    assert missed.met is False
    with pytest.raises(TargetMissedError, match=r"on the worst prompt: the plan misses the target"):
        missed.require()
    met = validate(tiny_pipeline(), plan, CLASSES, target=Target.min_ssim(ssim.worst), speed=False)
    assert met.met is True
    met.require()


def test_another_target_replaces_the_plans(plan: Plan) -> None:
    found = validate(tiny_pipeline(), plan, CLASSES, target=Target.min_psnr(300.0), speed=False)
    assert [quality.name for quality in found.qualities] == ["psnr", "ssim"]
    assert found.met is False


def test_a_metric_of_the_users_own_comes_first(plan: Plan) -> None:
    def error(dense: torch.Tensor, planned: torch.Tensor) -> torch.Tensor:
        return (dense - planned).abs().amax((1, 2, 3))

    own = Target.quality(error, at_most=1.0)
    found = validate(tiny_pipeline(), plan, CLASSES, target=own, speed=False)
    assert [quality.name for quality in found.qualities] == ["error", "ssim", "psnr"]
    assert found.reached == max(found.qualities[0].values)
    assert found.met is True


@pytest.mark.parametrize("target", [None, Target.threshold(0.1)])
def test_without_a_quality_there_is_nothing_to_check(target: Target | None, plan: Plan) -> None:
    held_to = searched_for(None if target is None else record_target(target), plan)
    found = validate(tiny_pipeline(), held_to, CLASSES, speed=False)
    assert [quality.name for quality in found.qualities] == ["ssim", "psnr"]
    assert found.met is None
    found.require()


@pytest.mark.parametrize("target", BUILT_IN)
def test_a_recorded_target_is_the_target_again(target: Target, plan: Plan) -> None:
    recorded = searched_for(record_target(target), plan)
    again = target_of(Plan.parse(recorded.model_dump_json()))
    assert again is not None
    assert record_target(again) == record_target(target)
    assert again.kind is target.kind


def test_a_metric_that_the_plan_does_not_hold_must_be_named(plan: Plan) -> None:
    own = searched_for(PlannedTarget(name="sharpness", bound=0.25, at_least=False), plan)
    with pytest.raises(ConfigError, match=r"sharpness[\s\S]*--metric package.module:function"):
        validate(tiny_pipeline(), own, CLASSES)
    assert metric_bound(own) == (None, 0.25)


def test_a_metric_without_a_bound_is_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"no bound of a metric[\s\S]*ssim[\s\S]*--at-least"):
        metric_bound(plan)


def test_generations_are_timed_in_pairs_each_prompt_at_least_once(plan: Plan) -> None:
    target = Target.max_latency(1000.0)
    found = validate(
        tiny_pipeline(),
        plan,
        CLASSES,
        target=target,
        lowering=Lowering.EAGER,
        repetitions=2,
    )
    assert found.timing is not None
    assert len(found.timing.speedup.samples) == 3
    assert found.reached == found.timing.candidate.median
    assert found.met is True
    assert found.drift.compilation is None  # nothing was compiled


def test_a_speed_cannot_be_checked_without_measuring_it(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="speed is not measured"):
        validate(tiny_pipeline(), plan, CLASSES, target=Target.min_speedup(1.1), speed=False)


def test_other_samplers_steps_and_guidance_are_refused(plan: Plan) -> None:
    other = tiny_digits_pipeline(DPMSolverMultistepScheduler())
    with pytest.raises(ConfigError, match=r"plan.sampler.scheduler"):
        validate(other, plan, CLASSES)
    with pytest.raises(ConfigError, match=r"plan.sampler.steps[\s\S]*got: *3\n *expected: 4"):
        validate(tiny_pipeline(), plan, {**CLASSES, "num_inference_steps": 3})
    with pytest.raises(ConfigError, match=r"plan.sampler.guidance_scale"):
        validate(tiny_pipeline(), plan, {**CLASSES, "guidance_scale": 5.0})


def test_the_other_order_of_guidance_is_refused() -> None:
    call: dict[str, Any] = {"labels": [1], "num_inference_steps": 3}
    shared = [Strategy.FULL, Strategy.SHARE_CFG, Strategy.SHARE_CFG]
    plan = plan_for(Pipeline("cond-first"), call, shared)
    with pytest.raises(ConfigError, match=r"plan.sampler.cfg_layout[\s\S]*uncond-first"):
        validate(Pipeline("uncond-first"), plan, call, speed=False)


def test_another_model_is_refused_and_the_pipeline_keeps_its_own(plan: Plan) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out_1.weight.mul_(1.5)
    original = pipeline.transformer
    with pytest.raises(ConfigError, match=r"plan.model.weights"):
        validate(pipeline, plan, CLASSES, speed=False)
    assert pipeline.transformer is original
    with pytest.raises(ConfigError, match="the pipeline has no transformer"):
        validate(object(), plan, CLASSES)


def test_a_pipeline_that_runs_the_plan_already_is_compared_with_its_plain_model(
    plan: Plan, found: Validation
) -> None:
    pipeline: Any = tiny_pipeline()
    options: dict[str, Any] = {"plan": plan, "lowering": "eager"}
    compiled = torch.compile(pipeline.transformer, backend="ditfastattn", options=options)
    pipeline.transformer = compiled
    again = validate(pipeline, plan, CLASSES, speed=False)
    assert pipeline.transformer is compiled
    assert again.qualities == found.qualities


def test_a_full_plan_does_not_drift() -> None:
    found = validate(tiny_pipeline(), tiny_plan(F, F), CLASSES, speed=False)
    assert found.drift == Drift(plan=0.0)
    assert found.drift.describe() == "no drift from the plan; compilation was not measured"
    assert found.qualities[1].worst == math.inf


def test_drift_without_compilation_is_the_plans(found: Validation) -> None:
    assert found.drift.plan > 0.0
    assert found.drift.compilation is found.drift.both is found.drift.plan_share is None
    assert found.drift.describe().startswith("this drift is the plan's alone")


@pytest.mark.parametrize(
    ("drift", "share", "sentence"),
    [
        (Drift(3e-4, 1e-4, 4e-4), 0.75, "75.0% of the drift comes from the plan, 25.0% from"),
        (Drift(0.0, 1e-9, 1e-9), 0.0, "0.0% of the drift comes from the plan, 100.0% from"),
        (Drift(1e-4, 1e-13, 1e-4), 1.0, "more than 99.9% of the drift comes from the plan, less"),
        (Drift(0.0, 0.0, 0.0), None, "no drift"),
    ],
)
def test_drift_is_attributed(drift: Drift, share: float | None, sentence: str) -> None:
    assert drift.plan_share == (None if share is None else pytest.approx(share, abs=1e-6))
    assert drift.describe().startswith(sentence)


def test_decibels_are_of_images_from_0_to_1() -> None:
    black, grey = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1)
    assert decibels(mean_squared_error([black], [grey])) == pytest.approx(20.0, abs=1e-4)
    assert decibels(0.0) == math.inf


@pytest.mark.slow
def test_drift_of_compilation_and_plan_are_separate(plan: Plan) -> None:
    told: list[str] = []
    pipeline = tiny_pipeline()
    found = validate(pipeline, plan, CLASSES, repetitions=1, on_progress=told.append)
    drift = found.drift
    assert drift.compilation is not None
    assert drift.both is not None
    assert 0.0 <= drift.compilation < 1e-9  # fp32: other roundings alone
    assert drift.both == pytest.approx(drift.plan, rel=0.05)  # so both is the plan's
    assert drift.plan_share == pytest.approx(1.0, abs=1e-3)
    assert found.timing is not None
    assert len(found.timing.speedup.samples) == 3
    assert told[-1] == "timing 3 pairs of generations"


@pytest.mark.slow
def test_the_drift_of_bfloat16_is_precisions_too() -> None:
    """In bf16 the rounding of a compiled dense model counts next to the plan's drift."""

    def narrow() -> DigitsPipeline:
        pipeline = tiny_pipeline()
        transformer: Any = pipeline.transformer
        transformer.to(torch.bfloat16)
        return pipeline

    call = {"class_labels": [0], "num_inference_steps": 4, "guidance_scale": 2.0}
    plan = plan_for(narrow(), call, [F, S, S, S], Target.min_ssim(0.9))
    assert plan.model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"plan.model.dtype"):
        validate(tiny_pipeline(), plan, CLASSES, speed=False)
    drift = validate(narrow(), plan, CLASSES, repetitions=1).drift
    assert drift.compilation is not None
    assert 1e-9 < drift.compilation < 1e-3
    assert drift.plan > 0.0
    assert drift.plan_share is not None
    assert 0.0 < drift.plan_share < 1.0
