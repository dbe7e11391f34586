"""Tiny configurations of diffusers' audio transformers, called as their pipelines call them."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video import (
    RISING_SIGMAS,
    SIGMAS,
    TEXT_DIM,
    rotary,
    steps,
    text,
    text_mask,
)

TOKENS = 48
CHANNELS = 8  # of latents


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


def _stable_audio(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, CHANNELS, TOKENS),
        "timestep": torch.tensor([timestep]),  # one for all lanes
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


def _minimax_music(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, CHANNELS, TOKENS),
        "timestep": steps(batch, timestep),
        "return_dict": False,
        "encoder_hidden_states": text(batch, TOKENS),
    }


AUDIO_MODELS: tuple[ZooModel, ...] = (
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
