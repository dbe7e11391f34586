"""Tiny Qwen-Image and Nucleus-Image models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import UnfilledModel, ZooModel
from ditfastattn.tools.zoo.image_inputs import (
    AXES,
    CHANNELS,
    FEATURES,
    HEADS,
    PACKED,
    SIDE,
    TEXT,
    UNIT,
    mask,
    packed,
)


def _qwen(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Qwen-Image."""
    return packed(batch, timestep) | {
        "encoder_hidden_states_mask": mask(batch),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
    }


def _qwen21(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Qwen-Image 2.1 without its cache; each image slot is 4 tokens."""
    slots = torch.arange(TEXT + SIDE) >= TEXT
    return _qwen(batch, timestep) | {"img_mask": slots.repeat(batch, 1)}


def _nucleus(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Nucleus-Image."""
    return _qwen(batch, timestep) | {"img_shapes": [(1, SIDE, SIDE)] * batch}


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "joint_attention_dim": FEATURES,
            "axes_dims_rope": AXES,
        },
        _qwen,
        UNIT,
    ),
    ZooModel(
        "QwenImage21Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "num_layers": 2,
            "context_in_dim": FEATURES,
            "axes_dims_rope": AXES,
        },
        _qwen21,
        UNIT,
    ),
    UnfilledModel(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "joint_attention_dim": FEATURES,
            "axes_dims_rope": AXES,
            "mlp_ratio": 6.0,  # with less, the dense block has no channels
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        _nucleus,
        UNIT,
    ),
)
