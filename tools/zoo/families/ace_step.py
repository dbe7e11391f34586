"""Tiny ACE-Step models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.audio_inputs import CHANNELS, TOKENS
from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import SIGMAS, text


def _ace_step(batch: int, timestep: float) -> dict[str, Any]:
    time = torch.full((batch,), timestep)
    return {
        "hidden_states": latents(batch, 2 * TOKENS, CHANNELS),
        "timestep": time,
        "timestep_r": time,
        "encoder_hidden_states": text(batch, channels=32),
        "context_latents": noise(2, 1, 2 * TOKENS, 2 * CHANNELS).repeat(batch, 1, 1),
        "attention_kwargs": None,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,  # a sliding window, all tokens, and again
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 3 * CHANNELS,
            "audio_acoustic_hidden_dim": CHANNELS,
            "patch_size": 2,
            "sliding_window": 8,
        },
        _ace_step,
        SIGMAS,
    ),
)
