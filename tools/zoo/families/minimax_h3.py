"""Tiny MiniMax H3 models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    RISING_SIGMAS,
    TEXT_DIM,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    grid_positions,
    text,
)

_H3_AUDIO = 8  # rows of two channels


def _minimax_h3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call whose rows pack text, audio and video; audio is a little noisier."""
    audio_start, video_start = TEXT_TOKENS, TEXT_TOKENS + _H3_AUDIO
    rows = video_start + TOKENS
    timestep_indices = torch.ones(rows, dtype=torch.int64)
    timestep_indices[audio_start:video_start] = 0
    token_tags = torch.zeros(rows, dtype=torch.int64)
    token_tags[:audio_start] = 1
    token_tags[audio_start:video_start] = 2
    position_ids = torch.zeros(rows, 3, dtype=torch.float64)
    position_ids[:audio_start, 0] = torch.arange(TEXT_TOKENS)
    position_ids[audio_start:video_start, 0] = TEXT_TOKENS + torch.arange(_H3_AUDIO) % 4
    position_ids[video_start:] = torch.stack(grid_positions(), dim=-1).double() * 8
    position_ids[video_start:, 0] += TEXT_TOKENS
    return {
        "hidden_states": latents(batch, TOKENS, 4 * CHANNELS),
        "audio_hidden_states": latents(batch, _H3_AUDIO, 8),
        "encoder_hidden_states": text(batch),
        "timestep": torch.tensor([timestep - 0.05, timestep]),
        "timestep_indices": timestep_indices,
        "attention_kwargs": None,
        "return_dict": False,
        "token_tags": token_tags,
        "position_ids": position_ids,
        "video_indices": torch.arange(video_start, rows),
        "audio_indices": torch.arange(audio_start, video_start),
        "text_indices": torch.arange(audio_start),
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "ffn_dim": 64,
            "in_channels": CHANNELS,
            "audio_in_channels": 8,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
        RISING_SIGMAS,
    ),
)
