"""Tiny Krea 2 models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.image_inputs import AXES, HEADS, PACKED, TEXT, UNIT, grid, mask, packed


def _krea2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Krea 2, which fuses several layers of the text encoder."""
    return packed(batch, timestep) | {
        "encoder_hidden_states": noise(1, batch, TEXT, 3, 16),
        "encoder_attention_mask": mask(batch).bool(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid()]),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "Krea2Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "axes_dims_rope": AXES,
        },
        _krea2,
        UNIT,
    ),
)
