"""Calls of a generation are counted, and what is unusual about them is said as it was seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from torch import Tensor

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Target, accelerate, calibrate, restore
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from tests.plans import mixed_plan_for
from tests.runtime.test_pipelines import Pipeline
from tests.tiers import slow
from tests.tiny_pipelines import TINY_PIPELINES, tiny_two_stage_wan_pipeline
from tests.works_with import works_with


class Colliding(Pipeline):
    """Give the transformer one timestep at two steps in a row, and call it once a step.

    The model's output is added to the latents too little to show in half precision.
    """

    def __call__(
        self,
        labels: list[int],
        num_inference_steps: int = 6,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn((len(labels), 4, 8, 8), generator=generator)
        for step, timestep in enumerate(self.scheduler.timesteps):
            rows = latents.bfloat16().float()
            given = self.scheduler.timesteps[step // 2 * 2] if guidance_scale != 1.0 else timestep
            with torch.no_grad():
                out = self._predict(rows, given, torch.tensor(labels))
            moved = self.scheduler.step(out, timestep, latents).prev_sample
            latents = latents if step % 2 == 0 else moved  # too small a step
        return latents


def test_steps_of_one_timestep_are_not_taken_for_guidance_in_two_calls() -> None:
    pipeline: Any = Colliding("cond-first")
    call: dict[str, Any] = {"labels": [1, 2]}
    assert detect_cfg_layout(pipeline, call) is CfgLayout.NONE
    plan = calibrate(pipeline, call, target=Target.threshold(0.2))
    assert plan.sampler.steps == 6
    accelerate(pipeline, plan, lowering="eager")
    images = [generate(pipeline, Prompt(call, 5)) for _ in range(2)]
    restore(pipeline)
    assert torch.equal(*images)


class Still(Pipeline):
    """Give the transformer the same first timestep at every step, as of a clean first frame."""

    def _given(self, timestep: Tensor) -> Tensor:
        return timestep * 0


def test_without_a_plan_steps_of_one_timestep_are_counted() -> None:
    pipeline: Any = Still("cond-first")
    call: dict[str, Any] = {"labels": [1], "num_inference_steps": 7}
    accelerate(pipeline, lowering="eager", threshold=0.2, cfg_layout="cond-first")
    first, *others = (generate(pipeline, Prompt(call, 5)) for _ in range(4))
    restore(pipeline)
    assert all(float((other - first).abs().max()) < 1e-5 for other in others)


FIVE_STEPS: dict[str, Any] = {"labels": [1], "num_inference_steps": 5}


class SkipLayer(Pipeline):
    """Call the transformer once more at some steps, as skip-layer guidance does."""

    first = 1

    def _after_calls(self, step: int, latents: Tensor, timestep: Tensor, classes: Tensor) -> None:
        if self.first <= step < 3:
            self._predict(latents, timestep, classes)


@works_with(
    "Guidance",
    "`calibrate` of guidance with further calls at some steps (skip-layer)",
    "refused",
    "what was seen at which steps",
)
@pytest.mark.parametrize(
    ("pipeline", "seen"),
    [
        (SkipLayer("cond-first"), r"2 row\(s\), then 1 row\(s\) at step 1: a further call"),
        (SkipLayer("separate"), r"2 calls at step 0, 3 calls at steps 1-2, 2 calls at steps 3-4"),
    ],
    ids=["skip-layer", "skip-layer-separate"],
)
def test_guidance_that_changes_within_a_generation_is_named(pipeline: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen) as raised:
        calibrate(pipeline, FIVE_STEPS, target=Target.min_psnr(20.0))
    assert "prompt" not in str(raised.value)
    assert "scheduler" not in str(raised.value)


@works_with(
    "Guidance",
    "a further call at some steps of a generation by a plan (skip-layer guidance)",
    "refused",
    "what was seen at which step, before that call runs",
)
def test_a_further_call_is_refused_where_it_comes() -> None:
    pipeline: Any = SkipLayer("cond-first")
    pipeline.first = 99
    accelerate(pipeline, mixed_plan_for(pipeline, FIVE_STEPS).plan, lowering="eager")
    pipeline.first = 1
    with pytest.raises(ConfigError, match=r"a further call at step 1, with 1 row\(s\)") as raised:
        generate(pipeline, Prompt(FIVE_STEPS, 5))
    restore(pipeline)
    assert "scheduler" not in str(raised.value)


@works_with(
    "Pipelines",
    "schedulers of second order, which call the transformer twice a step (Heun, KDPM2)",
    "works",
    "each call is a step of the plan",
)
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, slow(KDPM2DiscreteScheduler)])
@pytest.mark.parametrize("order", ["cond-first", slow("separate")])
def test_a_scheduler_of_second_order_makes_two_steps_of_one(order: str, scheduler: Any) -> None:
    pipeline: Any = Pipeline(order, scheduler())
    call: dict[str, Any] = {"labels": [1], "num_inference_steps": 3}
    mixed = mixed_plan_for(pipeline, call)
    assert mixed.plan.sampler.steps == 5
    expected = mixed.interpret(pipeline, Prompt(call, 5))
    accelerate(pipeline, mixed.plan, lowering="eager")
    images = [generate(pipeline, Prompt(call, 5)) for _ in range(2)]
    restore(pipeline)
    assert all(float((got - expected).abs().max()) < 1e-4 * expected.abs().max() for got in images)


# What a call's lists are ----------------------------------------------------------------------


class Scheduled(Pipeline):
    """Take a schedule as a list, as pipelines of flow matching do."""

    def __call__(  # type: ignore[override]  # it takes one argument more
        self,
        labels: list[int],
        sigmas: list[float] | None = None,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return super().__call__(labels, len(sigmas or [1.0]), guidance_scale, generator)

    def _decoded(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()  # an image's values


def test_a_list_of_the_schedule_is_of_every_image() -> None:
    sigmas = [1.0, 0.7, 0.4, 0.1]
    first, second = split_prompts({"labels": [1, 2], "sigmas": sigmas}, 7)
    assert (first.call, first.seed) == ({"labels": [1], "sigmas": sigmas}, 7)
    assert (second.call, second.seed) == ({"labels": [2], "sigmas": sigmas}, 8)
    (alone,) = split_prompts({"prompt": "a cat", "sigmas": sigmas}, 0)
    assert alone.call["sigmas"] == sigmas


def test_a_schedule_of_sigmas_is_calibrated() -> None:
    call = {"labels": [1], "sigmas": [1.0, 0.7, 0.4, 0.1]}
    for target in (Target.threshold(0.2), Target.min_psnr(20.0)):
        options: Any = {"objective": "flops", "lowering": "eager"}
        plan = calibrate(Scheduled("cond-first"), call, target=target, **options)
        assert plan.sampler.steps == 4


def test_a_generation_of_one_step_is_refused() -> None:
    call: dict[str, Any] = {"labels": [1], "sigmas": [1.0]}
    with pytest.raises(ConfigError, match="one step has nothing to reuse"):
        calibrate(Scheduled("cond-first"), call, target=Target.min_psnr(20.0))


# Two experts ------------------------------------------------------------------------------------


def two_experts() -> tuple[Any, dict[str, Any]]:
    return tiny_two_stage_wan_pipeline(), {"num_inference_steps": 4, **TINY_PIPELINES["wan"][1]}


def test_a_pipeline_of_the_second_expert_alone_is_refused_by_name() -> None:
    pipeline, call = two_experts()
    pipeline.transformer = None
    for refused in (
        lambda: calibrate(pipeline, call),
        lambda: accelerate(pipeline),
        lambda: ditfastattn.restore(pipeline),
    ):
        with pytest.raises(ConfigError, match=r"transformer_2 alone[\s\S]*second_transformer"):
            refused()


@pytest.mark.parametrize("layout", [None, CfgLayout.SEPARATE])
def test_a_generation_of_the_second_expert_alone_is_refused_by_name(
    layout: CfgLayout | None,
) -> None:
    pipeline, call = two_experts()
    pipeline.register_to_config(boundary_ratio=1.1)
    with pytest.raises(ConfigError, match=r"called its transformer_2 alone[\s\S]*boundary_ratio"):
        calibrate(pipeline, call, cfg_layout=layout)
