"""Tiny DiT, PixArt and DreamLite models, and the inputs of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.image_inputs import (
    CHANNELS,
    CLASSES,
    FEATURES,
    HEADS,
    PACKED,
    SIDE,
    labels,
    mask,
    small,
    square,
    steps,
)


def _dit(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of DiT: classes instead of text."""
    call = square(batch, timestep) | labels(batch) | {"timestep": steps(batch, timestep)}
    del call["encoder_hidden_states"]
    return call


def _pixart(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of PixArt below its largest resolution, the only one that reads sizes."""
    return square(batch, timestep) | {
        "timestep": steps(batch, timestep),
        "encoder_attention_mask": mask(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dreamlite(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of DreamLite's transformer, which the blocks of its U-Net contain.

    There its norms read no timestep; here they read the timestep and a class.
    """
    return (
        small(batch, timestep)
        | labels(batch)
        | {"timestep": steps(batch, timestep), "encoder_attention_mask": mask(batch)}
    )


DIT: Mapping[str, Any] = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "sample_size": 2 * SIDE,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel("DiTTransformer2DModel", {**DIT}, _dit),
    ZooModel(
        "Transformer2DModel",
        {
            **DIT,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
        },
        _dit,
    ),
    ZooModel(
        "PixArtTransformer2DModel",
        {**DIT, "cross_attention_dim": 32, "caption_channels": FEATURES},
        _pixart,
    ),
    ZooModel(
        "DreamLiteTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": FEATURES,
            "num_embeds_ada_norm": CLASSES,
            "norm_type": "ada_norm_zero",
            "qk_norm": "rms_norm",
        },
        _dreamlite,
    ),
)
