"""Tiny CogView and GLM-Image models, and the inputs of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import CHANNELS, FEATURES, HEADS, SIDE, square, steps


def sizes(batch: int, *names: str) -> dict[str, Any]:
    """Return an image size in pixels, or the corner of its crop, under each of ``names``."""
    values = {"original_size": 64.0, "target_size": 64.0, "crop_coords": 0.0}
    return {name: torch.full((batch, 2), values[name]) for name in names}


def _cogview3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of CogView 3 Plus."""
    return _cogview4(batch, timestep) | {"timestep": steps(batch, timestep)}


def _cogview4(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of CogView 4."""
    return square(batch, timestep) | sizes(batch, "original_size", "target_size", "crop_coords")


def _glm(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of GLM-Image, with its prior tokens dropped in the unconditional half."""
    dropped = torch.arange(batch) >= batch - batch // 2
    return square(batch, timestep) | {
        "prior_token_id": torch.arange(SIDE * SIDE).repeat(batch, 1),
        "prior_token_drop": dropped[:, None].repeat(1, SIDE * SIDE),
        **sizes(batch, "target_size", "crop_coords"),
    }


COGVIEW: Mapping[str, Any] = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "text_embed_dim": FEATURES,
    "time_embed_dim": 32,
    "condition_dim": 8,
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel("CogView3PlusTransformer2DModel", {**COGVIEW, "pos_embed_max_size": 8}, _cogview3),
    ZooModel(
        "CogView4Transformer2DModel",
        {**COGVIEW, "rope_axes_dim": (16, 16)},
        _cogview4,
    ),
    ZooModel(
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        _glm,
        (899.0, 699.0, 499.0, 299.0),
    ),
)
