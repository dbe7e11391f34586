"""Image-to-image and inpainting: a generation begins in the middle of a schedule, from an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
)

from ditfastattn import Target, accelerate, calibrate, restore
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.plans import assert_interprets, mixed_plan_for
from tests.tiers import slow_but
from tests.tiny_pipelines import IMG2IMG_ARGUMENTS, TINY_PIPELINES
from tests.works_with import works_with

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STEPS = 5
IMAGE = IMG2IMG_ARGUMENTS["image"]
MASK = torch.eye(32).flip(0).cumsum(0).reshape(1, 1, 32, 32)  # a triangle
FAMILIES = ("flux", "qwenimage", "sd3")
INPAINTED = ("flux", "qwenimage")  # for the other, diffusers wants 16 channels or 33


def edits(kind: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Return an editing pipeline of the parts of one from text, and its call of ``STEPS`` steps."""
    build, call = TINY_PIPELINES[name]
    pipeline = kind.from_pipe(build())
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": IMAGE, "strength": 0.5, "num_inference_steps": 2 * STEPS}
    if kind is AutoPipelineForInpainting:
        given["mask_image"] = MASK
    return pipeline, {**call, **given}


def assert_edits_as_interpreted(kind: Any, name: str) -> None:
    pipeline, call = edits(kind, name)
    mixed = mixed_plan_for(pipeline, call)
    assert mixed.plan.sampler.steps == STEPS
    assert_interprets(pipeline, call, mixed, within=1e-5)


@exercises("img2img", *FAMILIES)
@pytest.mark.parametrize("name", slow_but({"sd3"}, FAMILIES))
def test_an_image_is_changed_as_the_interpreter_does(name: str) -> None:
    assert_edits_as_interpreted(AutoPipelineForImage2Image, name)


@exercises("inpaint", *INPAINTED)
@works_with(
    "Pipelines",
    "inpainting (FLUX, Qwen-Image)",
    "works",
    "the latent is put back outside the mask after each step",
)
@pytest.mark.parametrize("name", slow_but({"flux"}, INPAINTED))
def test_a_masked_part_is_painted_as_the_interpreter_does(name: str) -> None:
    assert_edits_as_interpreted(AutoPipelineForInpainting, name)


@pytest.mark.slow
def test_whole_steps_of_inpainting_are_fitted() -> None:
    pipeline, call = edits(AutoPipelineForInpainting, "flux")
    target = Target.min_psnr(20.0)
    plan = calibrate(pipeline, call, target=target, method="whole-steps", objective="flops")
    skipped = [row for row in plan.strategies if row[-1].fitted]
    assert skipped
    prompt = Prompt(call, 500)
    dense = generate(pipeline, prompt)
    accelerate(pipeline, plan, lowering="eager")
    found = generate(pipeline, prompt)
    restore(pipeline)
    error = float((found - dense).square().mean())
    assert 0.0 < error < 0.01  # 20 dB
