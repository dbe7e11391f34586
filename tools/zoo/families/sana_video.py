"""Tiny SANA-Video and SANA-WM models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    GRID,
    TEXT_DIM,
    WIDTH,
    steps,
    text,
    text_mask,
    video,
)


def _sana(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _sana_wm(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call in which a camera moves forward from the first frame, which is given."""
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, 2, 3] = 0.1 * torch.arange(FRAMES)
    intrinsics = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(FRAMES, -1)
    cameras = torch.cat([poses.flatten(1), intrinsics], dim=1)
    return {
        "hidden_states": latents(batch, CHANNELS, FRAMES, GRID, GRID),
        "timestep": torch.tensor([0.0, timestep, timestep]).expand(batch, 1, FRAMES),
        "encoder_hidden_states": text(batch).unsqueeze(1),
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
        "mask": text_mask(batch),
        "camera_conditions": cameras.repeat(batch, 1, 1),
        "chunk_plucker": noise(2, 1, 12, FRAMES, GRID, GRID).repeat(batch, 1, 1, 1, 1),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": WIDTH,
            "caption_channels": TEXT_DIM,
            "mlp_ratio": 2.0,
            "rope_max_seq_len": 32,
        },
        _sana,
    ),
    ZooModel(
        "SanaWMTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "num_layers": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 12,
            "caption_channels": TEXT_DIM,
            "mlp_ratio": 2.0,
        },
        _sana_wm,
    ),
)
