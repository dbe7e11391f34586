"""Tiny Latte models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    SIZE,
    TEXT_DIM,
    WIDTH,
    steps,
    text,
    video,
)


def _latte(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": CHANNELS,
            "out_channels": 2 * CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": WIDTH,
            "attention_bias": True,
            "sample_size": SIZE,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": TEXT_DIM,
            "video_length": FRAMES,
        },
        _latte,
    ),
)
