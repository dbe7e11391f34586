"""Tiny SANA models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import CHANNELS, FEATURES, HEADS, SIDE, mask, small


def _sana(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of SANA."""
    return small(batch, timestep, CHANNELS) | {"encoder_attention_mask": mask(batch)}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "SanaTransformer2DModel",
        {
            **HEADS,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": FEATURES,
            "sample_size": SIDE,
        },
        _sana,
    ),
)
