"""Tiny Kandinsky models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    GRID,
    SIZE,
    TEXT_DIM,
    TEXT_TOKENS,
    WIDTH,
    conditioned_video,
    steps,
    text,
    text_mask,
)


def _kandinsky_video(batch: int) -> Tensor:
    """Return latents with empty conditions and their mask, channels last."""
    return conditioned_video(batch, CHANNELS, 1).permute(0, 2, 3, 4, 1).contiguous()


def _kandinsky_5(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _kandinsky_video(batch),
        "encoder_hidden_states": text(batch),
        "pooled_projections": noise(2, batch, 16),
        "timestep": torch.full((batch,), timestep),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, GRID, GRID)],
        "text_rope_pos": torch.arange(TEXT_TOKENS),
        "scale_factor": (1, 2, 2),
        "sparse_params": None,
        "return_dict": True,  # with False it returns the tensor itself, not a tuple
    }


def _kandinsky_6(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _kandinsky_video(batch),
        "audio_hidden_states": latents(batch, 10, 8),
        "encoder_hidden_states": text(batch),
        "pooled_projections": noise(2, batch, 16),
        "timestep": steps(batch, timestep),
        "visual_rope_pos": None,
        "encoder_attention_mask": text_mask(batch, torch.bool),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def _kandinsky_6_sr(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call conditioned on anchors only: no text, and 8 x 8 tokens, the fewest it takes."""
    video = latents(batch, FRAMES, SIZE, SIZE, CHANNELS)
    anchors = noise(2, batch, FRAMES, SIZE, SIZE, CHANNELS)
    mask = torch.ones(batch, FRAMES, SIZE, SIZE, 1)
    return {
        "hidden_states": torch.cat([video, anchors, mask], dim=-1),
        "timestep": steps(batch, timestep),
        "return_dict": False,
    }


_KANDINSKY_CONFIG: dict[str, Any] = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": 64,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}


_KANDINSKY_TEXT_CONFIG: dict[str, Any] = {
    "in_text_dim": TEXT_DIM,
    "in_text_dim2": 16,
    "num_text_blocks": 2,
    "visual_cond": True,
}

MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "Kandinsky5Transformer3DModel",
        {**_KANDINSKY_CONFIG, **_KANDINSKY_TEXT_CONFIG},
        _kandinsky_5,
    ),
    ZooModel(
        "Kandinsky6Transformer3DModel",
        {
            **_KANDINSKY_CONFIG,
            **_KANDINSKY_TEXT_CONFIG,
            "in_audio_dim": 8,
            "out_audio_dim": 8,
            "text_token_padding": True,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        _kandinsky_6,
    ),
    ZooModel("Kandinsky6SRTransformer3DModel", _KANDINSKY_CONFIG, _kandinsky_6_sr),
)
