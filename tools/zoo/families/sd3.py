"""Tiny Stable Diffusion 3 models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.image_inputs import CHANNELS, FEATURES, HEADS, SIDE, square


def _sd3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Stable Diffusion 3."""
    return square(batch, timestep) | {"pooled_projections": noise(2, batch, FEATURES)}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 2 * SIDE,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "joint_attention_dim": FEATURES,
            "caption_projection_dim": 32,
            "pooled_projection_dim": FEATURES,
            "pos_embed_max_size": 2 * SIDE,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        _sd3,
    ),
)
