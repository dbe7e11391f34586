"""Tiny Cosmos models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.video_inputs import CHANNELS, LOG_SIGMAS, TEXT_DIM, steps, text, video


def _cosmos(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "fps": 30,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "CosmosTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_DIM,
            "adaln_lora_dim": 16,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # a mask would need torchvision
        },
        _cosmos,
        LOG_SIGMAS,
    ),
)
