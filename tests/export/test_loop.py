"""The unrolled loop is the pipeline's generation: schedule, guidance and caches inside."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from ditfastattn import ConfigError, Strategy, export, load, verify
from ditfastattn.export.linear_scheduler import follow, linear_schedule
from tests.exercises import exercises
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES

EXPORTED = ("dit", "pixart", "sd3", "cogvideox")
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim of v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim that clips": lambda: DDIMScheduler(clip_sample=True),
    "dpm-solver++": DPMSolverMultistepScheduler,
    "dpm-solver++ of karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm-solver++ that clips": lambda: DPMSolverMultistepScheduler(thresholding=True),
    "euler": EulerDiscreteScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


def set_to(steps: int, scheduler: Any) -> Any:
    """Return ``scheduler``, set to a number of steps."""
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [1, 4, 11])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_the_recurrence_is_the_scheduler(name: str, steps: int) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(steps)
    found = linear_schedule(scheduler)
    generator = torch.Generator().manual_seed(1)
    noise, *outputs = torch.randn(steps + 1, 1, 1, 4, 4, generator=generator).double()
    sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    latents = follow(found, noise, outputs)
    for step, timestep in enumerate(scheduler.timesteps):
        assert found.steps[step].timestep == float(timestep)
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, timestep)
            assert torch.allclose(scaled, found.steps[step].input_scale * latents[step], atol=1e-4)
        sample = scheduler.step(outputs[step], timestep, sample, return_dict=False)[0].double()
        assert torch.allclose(latents[step + 1], sample, atol=1e-4, rtol=1e-4)


def test_a_clip_says_its_bounds() -> None:
    found = linear_schedule(set_to(4, SCHEDULERS["dpm-solver++ that clips"]()))
    assert all(step.clip and (step.clip.low, step.clip.high) == (-1, 1) for step in found.steps)
    assert all(
        step.clip is None for step in linear_schedule(set_to(4, SCHEDULERS["euler"]())).steps
    )


def test_a_multistep_solver_needs_few_terms() -> None:
    found = linear_schedule(set_to(20, DPMSolverMultistepScheduler()))
    assert max(len(step.latents) + len(step.outputs) for step in found.steps) <= 4


@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler(thresholding=True, sample_max_value=3.0), DDPMScheduler()],
    ids=["thresholds", "draws noise"],
)
def test_what_is_not_linear_is_refused(scheduler: Any) -> None:
    with pytest.raises(ConfigError, match="not linear"):
        linear_schedule(set_to(4, scheduler))


@pytest.mark.parametrize(
    ("name", "fixed"),
    slow_but(
        [("ddim", False), ("dpm-solver++ that clips", True)],
        product(["ddim", "ddim that clips", "dpm-solver++ that clips"], [False, True]),
    ),
)
def test_a_generation_is_the_pipelines(name: str, fixed: bool, tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(SCHEDULERS[name]())
    call: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 6, "guidance_scale": 2.0}
    steps = [
        Strategy.FULL,
        Strategy.WINDOW_SHARE_CFG,
        Strategy.FULL,
        Strategy.EXTRAPOLATE,
        Strategy.EXTRAPOLATE_QUADRATIC,
        Strategy.SHARE_STEP,
    ]
    plan = plan_for(pipeline, call, steps)
    out = tmp_path / "bundle"
    manifest = export(pipeline, call, plan, out, loop=True, dynamic_batch=not fixed)
    assert manifest.loop is not None
    assert [spec.name for spec in manifest.loop.conditions] == ["class_labels"]
    found = verify(out, pipeline, call)
    assert found.passed
    assert 0 < found.loop_error < 1e-4
    images = 1 if fixed else 3
    noise = torch.randn(images, 1, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([1, 2, 3][:images] + [10] * images)
    latents = load(out).generate(noise, class_labels=labels)
    pipeline.transformer = load(out)  # type: ignore[assignment]  # it stands in
    generator = torch.Generator().manual_seed(7)
    call["class_labels"] = [1, 2, 3][:images]
    expected = pipeline(**call, generator=generator, output_type="pt", return_dict=False)
    assert float(((latents / 2 + 0.5).clamp(0, 1) - expected[0]).abs().max()) < 1e-4


def test_the_first_latents_are_scaled_for_the_model(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(SCHEDULERS["euler"]())
    call: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 2, "guidance_scale": 2.0}
    plan = plan_for(pipeline, call, [Strategy.FULL] * 2)
    assert export(pipeline, call, plan, tmp_path, loop=True).stepping is not None
    assert 0 < verify(tmp_path).loop_error < 1e-4


@exercises("ONNX", *EXPORTED)
@exercises("loop", *EXPORTED)
@pytest.mark.parametrize("name", slow_but({"dit"}, EXPORTED))
def test_a_pipelines_bundle_and_loop_are_its_generation(name: str, tmp_path: Path) -> None:
    build, arguments = TINY_PIPELINES[name]
    pipeline, call = build(), {**arguments, "num_inference_steps": 5}
    steps = [Strategy.FULL, Strategy.FULL, Strategy.SHARE_CFG, Strategy.WINDOW, Strategy.SHARE_STEP]
    plan = plan_for(pipeline, call, steps)
    assert plan.changed > 0
    torch._dynamo.reset()
    manifest = export(pipeline, call, plan, tmp_path / "bundle", loop=True)
    assert manifest.loop is not None
    torch._dynamo.reset()
    found = verify(tmp_path / "bundle", pipeline, call)
    assert max(found.step_errors) < 1e-4
    assert 0.0 < found.loop_error < 1e-4
    assert found.psnr > 50.0
    assert found.passed


@exercises("ONNX", "flux")
@exercises("loop", "flux")
def test_a_schedule_shifted_by_resolution_is_the_pipelines(tmp_path: Path) -> None:
    """FLUX tells its scheduler how to shift, and gives the model thousandths of its timesteps."""
    build, arguments = TINY_PIPELINES["flux"]
    pipeline, call = build(), {**arguments, "num_inference_steps": 3}
    plan = plan_for(pipeline, call, [Strategy.FULL, Strategy.FULL, Strategy.SHARE_STEP])
    torch._dynamo.reset()
    manifest = export(pipeline, call, plan, tmp_path / "bundle", loop=True, dynamic_batch=False)
    assert manifest.stepping is not None
    assert manifest.stepping.steps[0].timestep == plan.sampler.timesteps[0] <= 1.0
    torch._dynamo.reset()
    found = verify(tmp_path / "bundle", pipeline, call)
    assert found.passed
    assert 0.0 < found.loop_error < 1e-4


def test_a_sampler_that_its_numbers_do_not_reproduce_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny_digits_pipeline(SCHEDULERS["ddim"]())
    call: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 4, "guidance_scale": 2.0}
    plan = plan_for(pipeline, call, [Strategy.FULL] * 3 + [Strategy.SHARE_STEP])
    other = {**call, "num_inference_steps": 3}
    with pytest.raises(ConfigError, match=r"another number of steps(.|\n)*without a loop"):
        export(pipeline, other, plan, tmp_path / "bundle", loop=True)
    step = pipeline.scheduler.step

    def rescaled(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(output * output.std(), *args, **kwargs)

    pipeline.scheduler.step = rescaled
    with pytest.raises(ConfigError, match="do not compute what the pipeline does"):
        export(pipeline, call, plan, tmp_path / "bundle", loop=True)
    manifest = export(pipeline, call, plan, tmp_path / "bundle")
    assert manifest.stepping is None
    assert "does not say what the sampler does between the steps" in caplog.text


def test_a_bundle_without_a_loop_says_so(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(SCHEDULERS["ddim"]())
    call = {"class_labels": [1], "num_inference_steps": 2}
    export(pipeline, call, None, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="no unrolled loop"):
        load(tmp_path / "bundle").generate(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ConfigError, match="a loop needs a plan"):
        export(pipeline, call, None, tmp_path / "other", loop=True)
