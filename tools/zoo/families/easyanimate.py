"""Tiny EasyAnimate models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import CHANNELS, SIZE, TEXT_DIM, text, video


def _easyanimate(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "timestep": torch.tensor([timestep] * batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "patch_size": 2,
            "sample_width": SIZE,
            "sample_height": SIZE,
            "num_layers": 4,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "text_embed_dim": TEXT_DIM,
        },
        _easyanimate,
    ),
)
