"""An IP-Adapter gives the transformer an image to attend to: an input like any other."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

import ditfastattn
from ditfastattn import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from tests.helpers import noise, randomize
from tests.plans import plan_for
from tests.tiny_pipelines import TINY_PIPELINES, tiny_sd3_pipeline
from tests.works_with import works_with

FEATURES, HIDDEN = 12, 16  # of an encoded image, and within the adapter


def adapted() -> Any:
    """Return the tiny pipeline of Stable Diffusion 3 with an IP-Adapter."""
    pipeline: Any = tiny_sd3_pipeline()
    transformer = pipeline.transformer
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    transformer.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(
                width, width, config.attention_head_dim, timesteps_emb_dim=HIDDEN
            )
            for name in transformer.attn_processors
        }
    )
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=FEATURES,
        output_dim=width,
        hidden_dim=HIDDEN,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=3,
        timestep_in_dim=8,
    )
    randomize(transformer)
    pipeline.set_ip_adapter_scale(0.8)
    return pipeline


@works_with(
    "Pipelines",
    "IP-Adapter (Stable Diffusion 3)",
    "works",
    "another image too; the adapter's weights are part of the plan's model",
)
def test_a_plan_runs_with_an_ip_adapter() -> None:
    torch._dynamo.reset()
    call = {**TINY_PIPELINES["sd3"][1], "num_inference_steps": 2}
    call["ip_adapter_image_embeds"] = noise(0, 2, 5, FEATURES)  # of nothing, and of the image
    other = call | {"ip_adapter_image_embeds": noise(1, 2, 5, FEATURES)}
    pipeline = adapted()
    full = plan_for(pipeline, call, [Strategy.FULL] * 2)
    shared = plan_for(pipeline, call, [Strategy.FULL, Strategy.SHARE_STEP])
    dense = [generate(pipeline, Prompt(one, 3)) for one in (call, other)]
    assert float((dense[0] - dense[1]).abs().max()) > 1e-4
    ditfastattn.accelerate(pipeline, full, lowering="eager")
    for one, expected in zip((call, other), dense, strict=True):
        assert float((generate(pipeline, Prompt(one, 3)) - expected).abs().max()) < 1e-4
    ditfastattn.accelerate(pipeline, shared, lowering="eager")
    planned = [generate(pipeline, Prompt(one, 3)) for one in (call, other)]
    assert all(not torch.equal(*pair) for pair in zip(planned, dense, strict=True))
    assert float((planned[0] - planned[1]).abs().max()) > 1e-4
