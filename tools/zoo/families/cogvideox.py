"""Tiny CogVideoX and ConsisID models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    SIZE,
    TEXT_DIM,
    TEXT_TOKENS,
    WIDTH,
    grid_positions,
    rotary,
    steps,
    text,
)


def _cogvideox(batch: int, timestep: float) -> dict[str, Any]:
    axes = zip((4, 6, 6), grid_positions(), strict=True)
    cosines, sines = zip(*(rotary(dim, grid, interleaved=True) for dim, grid in axes), strict=True)
    return {
        "hidden_states": latents(batch, FRAMES, CHANNELS, SIZE, SIZE),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "image_rotary_emb": (torch.cat(cosines, dim=1), torch.cat(sines, dim=1)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _consisid(batch: int, timestep: float) -> dict[str, Any]:
    call = _cogvideox(batch, timestep)
    image = noise(2, 1, *call["hidden_states"].shape[1:]).expand(batch, -1, -1, -1, -1)
    return {
        **call,
        "hidden_states": torch.cat([call["hidden_states"], image], dim=2),
        "id_vit_hidden": [noise(3, 1, 4, 16), noise(4, 1, 4, 16)],  # one face for all samples
        "id_cond": noise(5, 1, 16),
    }


_COGVIDEOX_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": SIZE,
    "sample_height": SIZE,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": TEXT_TOKENS,
    "use_rotary_positional_embeddings": True,
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel("CogVideoXTransformer3DModel", _COGVIDEOX_CONFIG, _cogvideox),
    ZooModel(
        "ConsisIDTransformer3DModel",
        {
            **_COGVIDEOX_CONFIG,
            "in_channels": 2 * CHANNELS,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 16,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": WIDTH * 2 // 3,
            "LFE_num_scale": 2,
        },
        _consisid,
    ),
)
