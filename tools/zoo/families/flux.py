"""Tiny FLUX, Chroma and Ovis-Image models, and the inputs of one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.image_inputs import (
    AXES,
    FEATURES,
    HEADS,
    PACKED,
    SIDE,
    TEXT,
    UNIT,
    diagonal,
    grid,
    mask,
    packed,
    positions,
)


def flux_ids(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with packed tokens and the position ids of FLUX.1."""
    return packed(batch, timestep) | {"txt_ids": torch.zeros(TEXT, 3), "img_ids": grid()}


def guidance(batch: int) -> dict[str, Any]:
    """Return the guidance scale that models distilled from guidance read."""
    return {"guidance": torch.full((batch,), 3.5)}


def _flux(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.1 [dev]."""
    pooled = {"pooled_projections": noise(2, batch, FEATURES)}
    return flux_ids(batch, timestep) | guidance(batch) | pooled


def _flux2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.2 [dev], whose position ids have a batch dimension."""
    ids = {"txt_ids": positions(length=TEXT), "img_ids": positions(SIDE, SIDE)}
    batched = {name: value.expand(batch, -1, -1) for name, value in ids.items()}
    return packed(batch, timestep) | guidance(batch) | batched


def _flux3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.3 with a reference image."""
    scale = torch.tensor([1.0, 0.5, 0.5, 1.0])
    return packed(batch, timestep) | {
        "txt_ids": positions(length=TEXT).float(),
        "img_ids": positions(SIDE, SIDE) * scale,
        "image_cond_hidden_states": latents(batch, 4, PACKED),
        "image_cond_ids": positions(2, 2) * scale - torch.tensor([0.0, 0.0, 0.0, 1.0]),
    }


def _chroma(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Chroma, whose mask holds floats that are added to the attention scores."""
    seen = torch.cat([mask(batch).float(), torch.ones(batch, SIDE * SIDE)], dim=1)
    return flux_ids(batch, timestep) | {"attention_mask": seen}


def _ovis(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Ovis-Image."""
    return packed(batch, timestep) | {"txt_ids": diagonal(), "img_ids": grid()}


FLUX: Mapping[str, Any] = {
    **HEADS,
    "in_channels": PACKED,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": FEATURES,
    "axes_dims_rope": AXES,
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": FEATURES, "guidance_embeds": True},
        _flux,
        UNIT,
    ),
    ZooModel(
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        _flux2,
        UNIT,
    ),
    ZooModel(
        "Flux3Transformer2DModel",
        {
            **FLUX,
            "cond_in_channels": PACKED,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
        UNIT,
    ),
    ZooModel(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "approximator_num_channels": 32,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        _chroma,
        UNIT,
    ),
    ZooModel("OvisImageTransformer2DModel", {**FLUX, "out_channels": PACKED}, _ovis, UNIT),
)
