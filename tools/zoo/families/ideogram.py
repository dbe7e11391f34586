"""Tiny Ideogram 4 models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.image_inputs import (
    FEATURES,
    HEADS,
    PACKED,
    RISING,
    SIDE,
    TEXT,
    floats,
    grid,
    mask,
    text,
)


def _ideogram(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Ideogram 4: one sequence of padding, text and image tokens."""
    valid = mask(batch).flip(1)
    padding = TEXT - valid.sum(dim=1)
    words = (torch.arange(TEXT) - padding[:, None]).clamp(min=0)
    places = grid().long() + 65536
    image = latents(batch, SIDE * SIDE, PACKED)
    tokens = torch.full((batch, SIDE * SIDE), 2)
    return {
        "hidden_states": torch.cat([torch.zeros(batch, TEXT, PACKED), image], dim=1),
        "timestep": floats(batch, timestep),
        "encoder_hidden_states": torch.nn.functional.pad(text(batch), (0, 0, 0, SIDE * SIDE)),
        "position_ids": torch.cat(
            [words[:, :, None].expand(-1, -1, 3), places.expand(batch, -1, -1)], dim=1
        ),
        "segment_ids": torch.cat([2 * valid - 1, torch.ones_like(tokens)], dim=1),
        "indicator": torch.cat([3 * valid, tokens], dim=1),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "Ideogram4Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": FEATURES,
            "mrope_section": (4, 2, 2),
        },
        _ideogram,
        RISING,
    ),
)
