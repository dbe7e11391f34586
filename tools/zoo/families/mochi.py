"""Tiny Mochi models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    RISING_STEPS,
    TEXT_DIM,
    TEXT_TOKENS,
    steps,
    text,
    text_mask,
    video,
)


def _mochi(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep),
        "encoder_attention_mask": text_mask(batch, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,  # the last one drops the text
            "pooled_projection_dim": 24,
            "in_channels": CHANNELS,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 32,
            "max_sequence_length": TEXT_TOKENS,
        },
        _mochi,
        RISING_STEPS,
    ),
)
