"""Tiny MiniMax Music models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.audio_inputs import CHANNELS, TOKENS
from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.video_inputs import RISING_SIGMAS, TEXT_DIM, steps, text


def _minimax_music(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, CHANNELS, TOKENS),
        "timestep": steps(batch, timestep),
        "return_dict": False,
        "encoder_hidden_states": text(batch, TOKENS),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": CHANNELS,
            "condition_dim": TEXT_DIM,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        _minimax_music,
        RISING_SIGMAS,
    ),
)
