"""Tiny Motif-Video models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    TEXT_DIM,
    conditioned_video,
    steps,
    text,
    text_mask,
)


def _motif(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": conditioned_video(batch, CHANNELS, 1),
        "timestep": steps(batch, timestep),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.bool),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 2 * CHANNELS + 1,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif,
    ),
)
