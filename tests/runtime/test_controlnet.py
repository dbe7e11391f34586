"""A ControlNet gives the transformer further inputs, which a plan runs with as with any others."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
from diffusers.pipelines.controlnet_sd3.pipeline_stable_diffusion_3_controlnet import (
    StableDiffusion3ControlNetPipeline,
)

import ditfastattn
from ditfastattn import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.exercises import exercises
from tests.helpers import randomize
from tests.plans import plan_for
from tests.tiny_pipelines import TINY_PIPELINES, tiny_sd3_pipeline
from tests.works_with import works_with

SHARED = [Strategy.FULL, Strategy.SHARE_STEP, Strategy.FULL]


def controlled() -> Any:
    """Return the tiny pipeline of Stable Diffusion 3 with a ControlNet of one layer."""
    parts: dict[str, Any] = tiny_sd3_pipeline().components
    config = parts["transformer"].config
    names = [
        *("attention_head_dim", "num_attention_heads", "in_channels", "out_channels"),
        *("sample_size", "patch_size", "pos_embed_max_size", "joint_attention_dim"),
        *("caption_projection_dim", "pooled_projection_dim"),
    ]
    net = SD3ControlNetModel(
        **{name: config[name] for name in names}, num_layers=1, extra_conditioning_channels=0
    )
    randomize(net)
    given = {name: part for name, part in parts.items() if part is not None}
    pipeline: Any = StableDiffusion3ControlNetPipeline(**given, controlnet=net.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@exercises("control", "sd3")
@works_with(
    "Pipelines",
    "ControlNet (Stable Diffusion 3)",
    "works",
    "another image or another scale of it too",
)
def test_a_plan_runs_with_a_controlnet() -> None:
    torch._dynamo.reset()
    call = {**TINY_PIPELINES["sd3"][1], "num_inference_steps": 3}
    side = torch.linspace(0.0, 1.0, 3 * call["height"] * call["width"])
    call["control_image"] = side.reshape(1, 3, call["height"], call["width"])
    pipeline = controlled()
    plan = plan_for(pipeline, call, SHARED)
    calls = [call, call | {"control_image": 1.0 - call["control_image"]}]
    calls.append(call | {"controlnet_conditioning_scale": 0.3})
    dense = [generate(pipeline, Prompt(one, 3)) for one in calls]
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = [generate(pipeline, Prompt(one, 3)) for one in calls]
    assert all(float((one - planned[0]).abs().max()) > 1e-4 for one in planned[1:])
    assert all(not torch.equal(*pair) for pair in zip(planned, dense, strict=True))
    ditfastattn.accelerate(pipeline, plan_for_full(call), lowering="eager")
    full = [generate(pipeline, Prompt(one, 3)) for one in calls]
    assert max(float((a - b).abs().max()) for a, b in zip(full, dense, strict=True)) < 1e-4


def plan_for_full(call: dict[str, Any]) -> ditfastattn.Plan:
    """Return a plan in which every step is full."""
    return plan_for(controlled(), call, [Strategy.FULL] * 3)
