"""Tiny HunyuanVideo and FramePack models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    GRID,
    SIZE,
    TEXT_DIM,
    conditioned_video,
    history,
    steps,
    text,
    text_mask,
    video,
)

_HUNYUAN_CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "guidance_embeds": True,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "pooled_projections": noise(2, batch, 16),
        "guidance": torch.full((batch,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _framepack(batch: int, timestep: float) -> dict[str, Any]:
    clean, twice, four_times, current = history()
    shape = (SIZE, SIZE)
    return {
        **_hunyuan(batch, timestep),
        "image_embeds": noise(3, batch, 5, 16),
        "indices_latents": current,
        "latents_clean": noise(4, batch, CHANNELS, 2, *shape),
        "indices_latents_clean": clean,
        "latents_history_2x": noise(5, batch, CHANNELS, 2, *shape),
        "indices_latents_history_2x": twice,
        "latents_history_4x": noise(6, batch, CHANNELS, 4, *shape),
        "indices_latents_history_4x": four_times,
    }


def _hunyuan_15(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": conditioned_video(batch, CHANNELS, 1, size=GRID),
        "image_embeds": torch.zeros(batch, 4, 16),  # text to video
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "encoder_hidden_states_2": noise(2, batch, 5, 16),
        "encoder_attention_mask_2": text_mask(batch, torch.float32, 5, masked=3),
        "attention_kwargs": None,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel("HunyuanVideoTransformer3DModel", _HUNYUAN_CONFIG, _hunyuan),
    ZooModel(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 2 * CHANNELS + 1,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "text_embed_dim": TEXT_DIM,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan_15,
    ),
    ZooModel(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HUNYUAN_CONFIG,
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
)
