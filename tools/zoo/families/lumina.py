"""Tiny Lumina models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import UnfilledModel, ZooModel
from ditfastattn.tools.zoo.image_inputs import AXES, CHANNELS, FEATURES, RISING, SIDE, mask, square


def _lumina2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Lumina 2, whose timesteps run from 0 to 1."""
    return square(batch, timestep) | {"encoder_attention_mask": mask(batch)}


def _lumina_next(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Lumina-Next, whose rotary embedding is complex."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary: Any = get_2d_rotary_pos_embed_lumina  # diffusers has no annotation here
    return square(batch, timestep) | {
        "encoder_mask": mask(batch),
        "image_rotary_emb": rotary(16, 2 * SIDE, 2 * SIDE),
        "cross_attention_kwargs": {"base_sequence_length": SIDE * SIDE},
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 2 * SIDE,
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": AXES,
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": FEATURES,
        },
        _lumina2,
        RISING,
    ),
    UnfilledModel(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 2 * SIDE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": FEATURES,
        },
        _lumina_next,
        RISING,
    ),
)
