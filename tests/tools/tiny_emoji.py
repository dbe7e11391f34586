"""A tiny emoji model: real components, random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from ditfastattn.tools.emoji.model import CaptionedTransformer
from ditfastattn.tools.emoji.pipeline import EmojiPipeline
from ditfastattn.tools.emoji.recipe import SAMPLER
from tests.helpers import randomize

SIZE = 16
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": SIZE,
}


def tiny_emoji_pipeline() -> EmojiPipeline:
    """Return an untrained 16x16 pipeline of two layers, the same one each time."""
    torch.manual_seed(0)
    model: Any = randomize(CaptionedTransformer(**TINY))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**SAMPLER)
    pipeline = EmojiPipeline(model.transformer, model.text_encoder, scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline
