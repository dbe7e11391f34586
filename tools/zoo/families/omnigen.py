"""Tiny OmniGen models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import CHANNELS, RISING, SIDE, TEXT, mask, square


def _omnigen(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of OmniGen without input images: left-padded text, the time, the image."""
    valid = mask(batch).flip(1)
    padding = TEXT - valid.sum(dim=1)
    index = torch.arange(TEXT + 1 + SIDE * SIDE)
    row, column = index[:, None], index[None, :]
    pads = padding[:, None, None]
    allowed = ((column <= row) | (row > TEXT)) & (column >= pads) | (row < pads)
    call = square(batch, timestep) | {
        "input_ids": (torch.arange(batch * TEXT).reshape(batch, TEXT) % 31 + 1) * valid,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": allowed.float(),
        "position_ids": (index - padding[:, None]).clamp(min=0),
    }
    del call["encoder_hidden_states"]
    return call


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "OmniGenTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "pos_embed_max_size": 8,
        },
        _omnigen,
        RISING,
    ),
)
