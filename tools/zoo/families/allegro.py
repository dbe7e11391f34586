"""Tiny Allegro models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    GRID,
    SIZE,
    TEXT_DIM,
    grid_positions,
    rotary,
    steps,
    text,
    text_mask,
    video,
)


def _allegro(batch: int, timestep: float) -> dict[str, Any]:
    positions = (torch.arange(FRAMES) / 2.2, torch.arange(GRID) / 2, torch.arange(GRID) / 2)
    return {
        "hidden_states": video(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch, timestep),
        "image_rotary_emb": (
            tuple(rotary(4, axis, interleaved=False) for axis in positions),
            tuple(axis.unsqueeze(0) for axis in grid_positions()),
        ),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,  # rope splits a head in three
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_height": SIZE,
            "sample_width": SIZE,
            "sample_frames": FRAMES,
            "caption_channels": TEXT_DIM,
        },
        _allegro,
    ),
)
