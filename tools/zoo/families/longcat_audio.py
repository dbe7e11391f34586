"""Tiny LongCat-Audio models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.audio_inputs import CHANNELS, TOKENS
from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.video_inputs import SIGMAS, TEXT_DIM, steps, text, text_mask


def _longcat(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, TOKENS, CHANNELS),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.bool),
        "timestep": steps(batch, timestep),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.bool),
        "latent_cond": torch.zeros(batch, TOKENS, CHANNELS),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": TEXT_DIM,
            "latent_dim": CHANNELS,
            "ff_mult": 2.0,
        },
        _longcat,
        SIGMAS,
    ),
)
