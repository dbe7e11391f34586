"""Tiny Bria and FIBO models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.families.flux import FLUX, flux_ids
from ditfastattn.tools.zoo.image_inputs import (
    AXES,
    CHANNELS,
    FEATURES,
    SIDE,
    TEXT,
    UNIT,
    mask,
    square,
    text,
)


def _fibo(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FIBO, which reads one layer of the text encoder per block."""
    seen = torch.cat([mask(batch).bool(), torch.ones(batch, SIDE * SIDE, dtype=torch.bool)], dim=1)
    return flux_ids(batch, timestep) | {
        "text_encoder_layers": list(noise(2, 4, batch, TEXT, FEATURES).unbind()),
        "joint_attention_kwargs": {"attention_mask": seen[:, None, None, :]},
    }


def _fibo2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FIBO 2: text for the perceiver, and for each block that reads it again."""
    return square(batch, timestep) | {
        "encoder_hidden_states": text(batch, 3),
        "encoder_attention_mask": mask(batch).bool(),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel("BriaTransformer2DModel", {**FLUX}, flux_ids),
    ZooModel("BriaFiboTransformer2DModel", {**FLUX, "text_encoder_dim": FEATURES}, _fibo),
    ZooModel(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": 32,
            "n_layers": 4,
            "n_heads": 2,
            "cap_feat_dim": FEATURES,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": TEXT,
            "axes_dims": AXES,
            "axes_lens": (32, 16, 16),
        },
        _fibo2,
        UNIT,
    ),
)
