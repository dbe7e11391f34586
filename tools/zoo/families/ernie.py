"""Tiny ERNIE-Image models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import AXES, FEATURES, PACKED, lengths, mask, small


def _ernie(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of ERNIE-Image."""
    call = small(batch, timestep)
    words = call.pop("encoder_hidden_states") * mask(batch)[:, :, None]
    return call | {"text_bth": words, "text_lens": torch.tensor(lengths(batch))}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "text_in_dim": FEATURES,
            "rope_axes_dim": AXES,
        },
        _ernie,
    ),
)
