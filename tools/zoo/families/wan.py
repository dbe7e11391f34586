"""Tiny Wan models and models built on Wan, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch

from ditfastattn.tools.zoo.base import ZooModel, latents, noise
from ditfastattn.tools.zoo.video_inputs import (
    CHANNELS,
    FRAMES,
    GRID,
    SIZE,
    TEXT_DIM,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    steps,
    text,
    video,
)

WAN_TEXT_TOKENS = 512  # Wan's attention splits image tokens from text by this number


_WAN_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


_WAN_IMAGE_CONFIG: dict[str, Any] = {"image_dim": 16, "added_kv_proj_dim": WIDTH}


def _wan(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": video(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "encoder_hidden_states": text(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_image(batch: int, timestep: float) -> dict[str, Any]:
    return {
        **_wan(batch, timestep),
        "hidden_states": torch.cat([video(batch), latents(batch, 4 + CHANNELS, FRAMES, 8, 8)], 1),
        "encoder_hidden_states": text(batch, WAN_TEXT_TOKENS),
        "encoder_hidden_states_image": noise(3, batch, 5, 16),
    }


def _wan_vace(batch: int, timestep: float) -> dict[str, Any]:
    return {
        **_wan(batch, timestep),
        "control_hidden_states": noise(2, batch, 12, FRAMES, SIZE, SIZE),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def _wan_animate(batch: int, timestep: float) -> dict[str, Any]:
    return {
        **_wan_image(batch, timestep),
        "pose_hidden_states": noise(4, batch, CHANNELS, FRAMES - 1, SIZE, SIZE),
        "face_pixel_values": noise(5, batch, 3, 5, 16, 16),
        "motion_encode_batch_size": 4,
    }


def _wan_animate_2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call that attends to stored reference frames, one fewer than it generates."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    references = FRAMES - 1
    cache = WanAnimate2KVCache(2)
    for index in range(2):
        shape = (batch, references * GRID * GRID, 2, 16)
        cache.get(index).store(noise(10 + index, *shape), noise(20 + index, *shape))
    prompts = text(batch, 8)
    return {
        "hidden_states": list(video(batch)),
        "timestep": torch.tensor([int(timestep)]),
        "encoder_hidden_states": [
            prompt[: TEXT_TOKENS + index % 2] for index, prompt in enumerate(prompts)
        ],
        "condition_latents": list(noise(2, batch, 4 + CHANNELS, FRAMES, SIZE, SIZE)),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": TOKENS,
        "reference_grid_sizes": torch.tensor([[references, GRID, GRID]] * batch),
        "origin_len": 4 * (references - 1) + 1,
        "origin_area": [8 * SIZE, 8 * SIZE],
        "return_dict": False,
    }


def _skyreels(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with a timestep per frame, as in diffusion forcing."""
    return {
        **_wan(batch, timestep),
        "timestep": torch.full((batch, FRAMES), int(timestep)),
        "enable_diffusion_forcing": True,
    }


def _anyflow(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": latents(batch, FRAMES, CHANNELS, SIZE, SIZE),
        "timestep": torch.full((batch, FRAMES), timestep),
        "r_timestep": torch.full((batch, FRAMES), max(timestep - 200.0, 0.0)),
        "encoder_hidden_states": text(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _anyflow_far(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call for the third chunk; the first is cached compressed, the second in full."""
    full = (2, batch, 2, 2 * FRAMES * GRID * GRID, 16)
    compressed = (2, batch, 2, 2 * FRAMES * 4, 16)
    return {
        **_anyflow(batch, timestep),
        "chunk_partition": [1, 1, FRAMES],
        "kv_cache": {
            layer: {
                "full_cache": noise(10 + layer, *full),
                "compressed_cache": noise(20 + layer, *compressed),
            }
            for layer in range(2)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel("WanTransformer3DModel", _WAN_CONFIG, _wan),
    ZooModel(
        "WanVACETransformer3DModel",
        {**_WAN_CONFIG, "vace_layers": [0, 1], "vace_in_channels": 12},
        _wan_vace,
    ),
    ZooModel(
        "WanAnimateTransformer3DModel",
        {
            **_WAN_CONFIG,
            **_WAN_IMAGE_CONFIG,
            "in_channels": 2 * CHANNELS + 4,
            "latent_channels": CHANNELS,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        _wan_animate,
    ),
    ZooModel(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 8,
            "in_dim": 2 * CHANNELS + 4,
            "dim": WIDTH,
            "ffn_dim": 64,
            "freq_dim": 32,
            "text_dim": TEXT_DIM,
            "out_dim": CHANNELS,
            "num_heads": 2,
            "num_layers": 2,
            "use_img_emb": False,  # its projection is 1280 wide, whatever is configured
        },
        _wan_animate_2,
    ),
    ZooModel(
        "ChronoEditTransformer3DModel",
        {
            **_WAN_CONFIG,
            **_WAN_IMAGE_CONFIG,
            "attention_head_dim": 12,  # rope splits a head in three
            "added_kv_proj_dim": 24,
            "in_channels": 2 * CHANNELS + 4,
        },
        _wan_image,
    ),
    ZooModel("SkyReelsV2Transformer3DModel", _WAN_CONFIG, _skyreels),
    ZooModel("AnyFlowTransformer3DModel", _WAN_CONFIG, _anyflow),
    ZooModel(
        "AnyFlowFARTransformer3DModel",
        {**_WAN_CONFIG, "full_chunk_limit": 2, "chunk_partition": (1, 1, FRAMES)},
        _anyflow_far,
    ),
)
