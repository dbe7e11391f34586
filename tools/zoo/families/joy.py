"""Tiny JoyImage-Edit models, and the inputs of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.image_inputs import AXES, CHANNELS, FEATURES, SIDE, mask, square


def _joy(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of JoyImage-Edit: the latents of the image to edit, then the noise."""
    pair = latents(batch, 2, CHANNELS, 1, 2 * SIDE, 2 * SIDE)
    return square(batch, timestep) | {"hidden_states": pair}


def _joy_plus(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of JoyImage-Edit-Plus: patches of the noise, then of the image to edit."""
    return square(batch, timestep) | {
        "hidden_states": latents(batch, SIDE * SIDE + 4, CHANNELS, 1, 2, 2),
        "encoder_hidden_states_mask": mask(batch),
        "shape_list": [[(1, SIDE, SIDE), (1, 2, 2)]] * batch,
    }


JOY: Mapping[str, Any] = {
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": FEATURES,
    "num_layers": 2,
    "rope_dim_list": list(AXES),
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel("JoyImageEditTransformer3DModel", {**JOY}, _joy),
    ZooModel("JoyImageEditPlusTransformer3DModel", {**JOY}, _joy_plus),
)
