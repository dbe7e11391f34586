"""Tiny Stable Audio models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.audio_inputs import CHANNELS, TOKENS
from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import SIGMAS, TEXT_DIM, rotary, steps, text, text_mask


def _stable_audio(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, CHANNELS, TOKENS),
        "timestep": torch.tensor([timestep]),  # one for all samples
        "encoder_hidden_states": text(batch),
        "global_hidden_states": noise(2, 1, 1, 16).repeat(batch, 1, 1),
        "rotary_embedding": rotary(8, torch.arange(TOKENS + 1), interleaved=False),
        "return_dict": False,
    }


def _stable_audio_3(batch: int, timestep: float) -> dict[str, Any]:
    duration = noise(2, 1, TEXT_DIM).repeat(batch, 1)
    prompt_mask = text_mask(batch)
    return {
        "hidden_states": latents(batch, CHANNELS, TOKENS),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": torch.cat([text(batch), duration.unsqueeze(1)], dim=1),
        "global_hidden_states": duration,
        "encoder_attention_mask": torch.cat([prompt_mask, prompt_mask.new_ones(batch, 1)], dim=1),
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "StableAudioDiTModel",
        {
            "sample_size": TOKENS,
            "in_channels": CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": CHANNELS,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": TEXT_DIM,
        },
        _stable_audio,
        SIGMAS,
    ),
    ZooModel(
        "StableAudio3DiTModel",
        {
            "io_channels": CHANNELS,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": TEXT_DIM,
            "global_cond_dim": TEXT_DIM,
            "local_add_cond_dim": CHANNELS + 1,
            "timestep_features_dim": 32,
            "ff_mult": 2.0,
            "num_memory_tokens": 4,
        },
        _stable_audio_3,
        SIGMAS,
    ),
)
