"""Tiny Z-Image models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.image_inputs import (
    AXES,
    CHANNELS,
    FEATURES,
    RISING,
    SIDE,
    floats,
    lengths,
    text,
)


def _z_image(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Z-Image: lists with one tensor per sample, as its first output is."""
    images = latents(batch, CHANNELS, 2 * SIDE, 2 * SIDE).unsqueeze(2)
    captions = zip(text(batch), lengths(batch), strict=True)
    return {
        "x": list(images.unbind()),
        "t": floats(batch, timestep),
        "cap_feats": [caption[:length] for caption, length in captions],
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "ZImageTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": FEATURES,
            "axes_dims": list(AXES),
            "axes_lens": [128, 16, 16],
        },
        _z_image,
        RISING,
        "t",
    ),
)
