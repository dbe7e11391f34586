"""Tiny LTX and LTX 2 models with SANA-WM's refiner, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    GRID,
    TEXT_DIM,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    steps,
    text,
    text_mask,
)

_AUDIO_TOKENS, _AUDIO_WIDTH = 8, 16


_FPS = 24.0


_LTX2_CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": CHANNELS,
    "audio_out_channels": CHANNELS,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": _AUDIO_WIDTH,
    "num_layers": 2,
    "caption_channels": TEXT_DIM,
    "rope_type": "split",
}


def _ltx(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, TOKENS, CHANNELS),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep),
        "encoder_attention_mask": text_mask(batch, torch.bool),
        "num_frames": FRAMES,
        "height": GRID,
        "width": GRID,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _ltx2(batch: int, timestep: float) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

    cpu = torch.device("cpu")
    video_rope = LTX2AudioVideoRotaryPosEmbed(WIDTH)
    audio_rope = LTX2AudioVideoRotaryPosEmbed(_AUDIO_WIDTH, scale_factors=(4,), modality="audio")
    time = steps(batch, timestep)
    mask = text_mask(batch)
    return {
        "hidden_states": latents(batch, TOKENS, CHANNELS),
        "audio_hidden_states": latents(batch, _AUDIO_TOKENS, CHANNELS),
        "encoder_hidden_states": text(batch),
        "audio_encoder_hidden_states": noise(2, batch, TEXT_TOKENS, TEXT_DIM),
        "timestep": time,
        "sigma": time,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": FRAMES,
        "height": GRID,
        "width": GRID,
        "fps": _FPS,
        "audio_num_frames": _AUDIO_TOKENS,
        "video_coords": video_rope.prepare_video_coords(batch, FRAMES, GRID, GRID, cpu, fps=_FPS),
        "audio_coords": audio_rope.prepare_audio_coords(batch, _AUDIO_TOKENS, cpu),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _sana_wm_refiner(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call for frames that attend to a sink frame and to one refined before."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import (
        SanaWMLTX2AudioVideoRotaryPosEmbed,
        SanaWMRefinerKVCache,
    )

    frame = GRID * GRID
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(WIDTH)
    coords = rope.prepare_video_coords(batch, 2 + FRAMES, GRID, GRID, torch.device("cpu"), fps=_FPS)
    cosines, sines = rope(coords)
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = (cosines[:, :frame], sines[:, :frame])
    for index in range(len(cache)):
        layer = cache.get(index)
        seed = 10 * (index + 1)
        layer.store_sink(noise(seed, batch, frame, WIDTH), noise(seed + 1, batch, frame, WIDTH))
        layer.store_history(
            noise(seed + 2, batch, frame, WIDTH), noise(seed + 3, batch, frame, WIDTH)
        )
    return {
        "hidden_states": latents(batch, TOKENS, CHANNELS),
        "encoder_hidden_states": text(batch),
        "timestep": torch.full((batch, TOKENS), timestep),
        "video_rotary_emb": (cosines[:, 2 * frame :], sines[:, 2 * frame :]),
        "encoder_attention_mask": text_mask(batch),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": WIDTH,
            "num_layers": 2,
            "caption_channels": TEXT_DIM,
        },
        _ltx,
    ),
    ZooModel("LTX2VideoTransformer3DModel", _LTX2_CONFIG, _ltx2),
    ZooModel(
        "SanaWMLTX2RefinerTransformer3DModel",
        {**_LTX2_CONFIG, "rope_type": "interleaved"},
        _sana_wm_refiner,
    ),
)
