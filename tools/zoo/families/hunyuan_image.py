"""Tiny HunyuanDiT and HunyuanImage models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import (
    CHANNELS,
    FEATURES,
    HEADS,
    PACKED,
    SIDE,
    TEXT,
    mask,
    small,
    square,
    text,
)


def _hunyuan(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HunyuanDiT, which reads two text encoders."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return square(batch, timestep) | {
        "text_embedding_mask": mask(batch),
        "encoder_hidden_states_t5": text(batch, channels=16, seed=2),
        "text_embedding_mask_t5": mask(batch),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * batch),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (SIDE, SIDE)),
    }


def _hunyuan_image(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HunyuanImage without glyphs: their projection has 4M weights."""
    return small(batch, timestep) | {"encoder_attention_mask": mask(batch)}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": CHANNELS,
            "patch_size": 2,
            "sample_size": 2 * SIDE,
            "hidden_size": 32,
            "num_layers": 4,  # the last takes what the first skips
            "cross_attention_dim": FEATURES,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        _hunyuan,
    ),
    ZooModel(
        "HunyuanImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "num_layers": 2,
            "num_single_layers": 2,
            "text_embed_dim": FEATURES,
            "rope_axes_dim": (8, 8),
        },
        _hunyuan_image,
    ),
)
