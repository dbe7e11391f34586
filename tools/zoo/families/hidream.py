"""Tiny HiDream models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.image_inputs import CHANNELS, FEATURES, SIDE, TEXT, floats, text


def _hidream(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HiDream, which takes text layers in a dimension before the batch."""
    return {
        "hidden_states": latents(batch, CHANNELS, 2 * SIDE, 2 * SIDE),
        "timesteps": floats(batch, timestep),
        "encoder_hidden_states_t5": text(batch),
        "encoder_hidden_states_llama3": noise(2, 4, batch, TEXT, FEATURES),
        "pooled_embeds": noise(3, batch, FEATURES),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "HiDreamImageTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [FEATURES, FEATURES],
            "text_emb_dim": FEATURES,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (2 * SIDE, 2 * SIDE),
            "llama_layers": [0, 1, 2, 3],
        },
        _hidream,
        argument="timesteps",
    ),
)
