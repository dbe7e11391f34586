"""Tiny configurations of diffusers' video transformers, called as their pipelines call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditfastattn.tools.zoo.base import ZooModel, latents, noise

FRAMES, SIZE = 3, 8  # latents of 3 frames, 8 x 8: 48 tokens in patches of 1 x 2 x 2
GRID = SIZE // 2
TOKENS = FRAMES * GRID * GRID
CHANNELS = 4  # of latents
WIDTH = 32  # of the residual stream: 2 heads of 16, except where rope needs another head
TEXT_TOKENS, TEXT_DIM = 6, 16
WAN_TEXT_TOKENS = 512  # Wan's attention splits image tokens from text by this number

SIGMAS = (0.9, 0.7, 0.5, 0.3)
RISING_SIGMAS = (0.1, 0.3, 0.5, 0.7)  # of models whose time runs from noise, 0, to data, 1
RISING_STEPS = (100.0, 300.0, 500.0, 700.0)
LOG_SIGMAS = (1.0, 0.6, 0.2, -0.2)  # a quarter of log sigma, as EDM's schedulers have it


def steps(batch: int, timestep: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the timestep of every lane, expanded as pipelines expand it."""
    return torch.tensor(timestep).to(dtype).expand(batch)


def text(batch: int, tokens: int = TEXT_TOKENS, channels: int = TEXT_DIM) -> Tensor:
    """Return prompt embeddings, others in every lane."""
    return noise(1, batch, tokens, channels)


def text_mask(
    batch: int, dtype: torch.dtype = torch.int64, tokens: int = TEXT_TOKENS, masked: int = 2
) -> Tensor:
    """Return a mask that is 1 at valid tokens: every second lane, the first too, has fewer."""
    mask = torch.ones(batch, tokens, dtype=dtype)
    mask[::2, tokens - masked :] = 0
    return mask


def rotary(dim: int, positions: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[positions, dim]`` of rotary embeddings."""
    angles = torch.outer(positions.float(), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    if interleaved:
        angles = angles.repeat_interleave(2, dim=1)
    else:
        angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def _video(batch: int, channels: int = CHANNELS) -> Tensor:
    return latents(batch, channels, FRAMES, SIZE, SIZE)


def _conditioned_video(batch: int, *channels: int, size: int = SIZE) -> Tensor:
    """Return latents with channels of conditions, zeros in text-to-video."""
    shape = (FRAMES, size, size)
    zeros = [torch.zeros(batch, count, *shape) for count in channels]
    return torch.cat([latents(batch, CHANNELS, *shape), *zeros], dim=1)


def _grid_positions() -> tuple[Tensor, Tensor, Tensor]:
    """Return the frame, row and column of every token."""
    axes = torch.meshgrid(
        torch.arange(FRAMES), torch.arange(GRID), torch.arange(GRID), indexing="ij"
    )
    frames, rows, columns = (axis.flatten() for axis in axes)
    return frames, rows, columns


# Latte


def _latte(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


_LATTE = ZooModel(
    "LatteTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": 2 * CHANNELS,
        "num_layers": 2,
        "cross_attention_dim": WIDTH,
        "attention_bias": True,
        "sample_size": SIZE,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": TEXT_DIM,
        "video_length": FRAMES,
    },
    _latte,
)


# CogVideoX and ConsisID


def _cogvideox(batch: int, timestep: float) -> dict[str, Any]:
    axes = zip((4, 6, 6), _grid_positions(), strict=True)
    cosines, sines = zip(*(rotary(dim, grid, interleaved=True) for dim, grid in axes), strict=True)
    return {
        "hidden_states": latents(batch, FRAMES, CHANNELS, SIZE, SIZE),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "image_rotary_emb": (torch.cat(cosines, dim=1), torch.cat(sines, dim=1)),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _consisid(batch: int, timestep: float) -> dict[str, Any]:
    call = _cogvideox(batch, timestep)
    image = noise(2, 1, *call["hidden_states"].shape[1:]).expand(batch, -1, -1, -1, -1)
    return {
        **call,
        "hidden_states": torch.cat([call["hidden_states"], image], dim=2),
        "id_vit_hidden": [noise(3, 1, 4, 16), noise(4, 1, 4, 16)],  # one face for all lanes
        "id_cond": noise(5, 1, 16),
    }


_COGVIDEOX_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": SIZE,
    "sample_height": SIZE,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": TEXT_TOKENS,
    "use_rotary_positional_embeddings": True,
}

_COGVIDEOX = ZooModel("CogVideoXTransformer3DModel", _COGVIDEOX_CONFIG, _cogvideox)

_CONSISID = ZooModel(
    "ConsisIDTransformer3DModel",
    {
        **_COGVIDEOX_CONFIG,
        "in_channels": 2 * CHANNELS,
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 16,
        "LFE_vit_dim": 16,
        "LFE_depth": 2,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 4,
        "LFE_output_dim": WIDTH * 2 // 3,
        "LFE_num_scale": 2,
    },
    _consisid,
)


# LTX, LTX 2 and SANA-WM's refiner


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


_LTX = ZooModel(
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


_LTX2 = ZooModel("LTX2VideoTransformer3DModel", _LTX2_CONFIG, _ltx2)


def _sana_wm_refiner(batch: int, timestep: float) -> dict[str, Any]:
    """Denoise a block of frames that attends to one frame kept as sink and one refined before."""
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


_SANA_WM_REFINER = ZooModel(
    "SanaWMLTX2RefinerTransformer3DModel",
    {**_LTX2_CONFIG, "rope_type": "interleaved"},
    _sana_wm_refiner,
)


# Wan and what was built on it

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
        "hidden_states": _video(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "encoder_hidden_states": text(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan_image(batch: int, timestep: float) -> dict[str, Any]:
    return {
        **_wan(batch, timestep),
        "hidden_states": torch.cat([_video(batch), latents(batch, 4 + CHANNELS, FRAMES, 8, 8)], 1),
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
    """Attend to reference frames that an earlier call stored, one fewer than are generated."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    references = FRAMES - 1
    cache = WanAnimate2KVCache(2)
    for index in range(2):
        shape = (batch, references * GRID * GRID, 2, 16)
        cache.get(index).store(noise(10 + index, *shape), noise(20 + index, *shape))
    prompts = text(batch, 8)
    return {
        "hidden_states": list(_video(batch)),
        "timestep": torch.tensor([int(timestep)]),
        "encoder_hidden_states": [
            prompt[: TEXT_TOKENS + lane % 2] for lane, prompt in enumerate(prompts)
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
    """Give every frame its timestep, as diffusion forcing does."""
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
    """Denoise the third chunk: the first is in the cache compressed, the second in full."""
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


_WAN = ZooModel("WanTransformer3DModel", _WAN_CONFIG, _wan)
_WAN_VACE = ZooModel(
    "WanVACETransformer3DModel",
    {**_WAN_CONFIG, "vace_layers": [0, 1], "vace_in_channels": 12},
    _wan_vace,
)
_WAN_ANIMATE = ZooModel(
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
)
_WAN_ANIMATE_2 = ZooModel(
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
        "use_img_emb": False,  # its projection is 1280 wide, whatever the configuration
    },
    _wan_animate_2,
)
_CHRONOEDIT = ZooModel(
    "ChronoEditTransformer3DModel",
    {
        **_WAN_CONFIG,
        **_WAN_IMAGE_CONFIG,
        "attention_head_dim": 12,  # rope splits a head in three
        "added_kv_proj_dim": 24,
        "in_channels": 2 * CHANNELS + 4,
    },
    _wan_image,
)
_SKYREELS = ZooModel("SkyReelsV2Transformer3DModel", _WAN_CONFIG, _skyreels)
_ANYFLOW = ZooModel("AnyFlowTransformer3DModel", _WAN_CONFIG, _anyflow)
_ANYFLOW_FAR = ZooModel(
    "AnyFlowFARTransformer3DModel",
    {**_WAN_CONFIG, "full_chunk_limit": 2, "chunk_partition": (1, 1, FRAMES)},
    _anyflow_far,
)


# Hunyuan

_HUNYUAN_CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "guidance_embeds": True,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "pooled_projections": noise(2, batch, 16),
        "guidance": torch.full((batch,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _history() -> tuple[Tensor, ...]:
    """Return the indices of an image's frame, of history in three resolutions, and of latents."""
    indices = torch.arange(8 + FRAMES)
    prefix, long, middle, short, current = torch.split_with_sizes(indices, [1, 4, 2, 1, FRAMES])
    return torch.cat([prefix, short]), middle, long, current


def _framepack(batch: int, timestep: float) -> dict[str, Any]:
    clean, twice, four_times, current = _history()
    shape = (SIZE, SIZE)
    return {
        **_hunyuan(batch, timestep),
        "image_embeds": noise(3, batch, 5, 16),
        "indices_latents": current,
        "latents_clean": noise(4, batch, CHANNELS, 2, *shape),
        "indices_latents_clean": clean,
        "latents_history_2x": noise(5, batch, CHANNELS, 2, *shape),
        "indices_latents_history_2x": twice,
        "latents_history_4x": noise(6, batch, CHANNELS, 4, *shape),
        "indices_latents_history_4x": four_times,
    }


def _hunyuan_15(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _conditioned_video(batch, CHANNELS, 1, size=GRID),
        "image_embeds": torch.zeros(batch, 4, 16),  # text to video
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "encoder_hidden_states_2": noise(2, batch, 5, 16),
        "encoder_attention_mask_2": text_mask(batch, torch.float32, 5, masked=3),
        "attention_kwargs": None,
        "return_dict": False,
    }


_HUNYUAN = ZooModel("HunyuanVideoTransformer3DModel", _HUNYUAN_CONFIG, _hunyuan)
_FRAMEPACK = ZooModel(
    "HunyuanVideoFramepackTransformer3DModel",
    {
        **_HUNYUAN_CONFIG,
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    },
    _framepack,
)
_HUNYUAN_15 = ZooModel(
    "HunyuanVideo15Transformer3DModel",
    {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": 16,
        "image_embed_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    _hunyuan_15,
)


# Helios


def _helios(batch: int, timestep: float) -> dict[str, Any]:
    short, middle, long, current = _history()
    shape = (SIZE, SIZE)
    return {
        "hidden_states": _video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": current.unsqueeze(0),
        "indices_latents_history_short": short.unsqueeze(0),
        "indices_latents_history_mid": middle.unsqueeze(0),
        "indices_latents_history_long": long.unsqueeze(0),
        "latents_history_short": noise(4, batch, CHANNELS, 2, *shape),
        "latents_history_mid": noise(5, batch, CHANNELS, 2, *shape),
        "latents_history_long": noise(6, batch, CHANNELS, 4, *shape),
        "attention_kwargs": None,
        "return_dict": False,
    }


_HELIOS = ZooModel(
    "HeliosTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_dim": (4, 6, 6),
    },
    _helios,
)


# Mochi


def _mochi(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "encoder_hidden_states": text(batch),
        "timestep": steps(batch, timestep),
        "encoder_attention_mask": text_mask(batch, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


_MOCHI = ZooModel(
    "MochiTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,  # the last one drops the text
        "pooled_projection_dim": 24,
        "in_channels": CHANNELS,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 32,
        "max_sequence_length": TEXT_TOKENS,
    },
    _mochi,
    RISING_STEPS,
)


# Allegro


def _allegro(batch: int, timestep: float) -> dict[str, Any]:
    positions = (torch.arange(FRAMES) / 2.2, torch.arange(GRID) / 2, torch.arange(GRID) / 2)
    return {
        "hidden_states": _video(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch, timestep),
        "image_rotary_emb": (
            tuple(rotary(4, axis, interleaved=False) for axis in positions),
            tuple(axis.unsqueeze(0) for axis in _grid_positions()),
        ),
        "return_dict": False,
    }


_ALLEGRO = ZooModel(
    "AllegroTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,  # rope splits a head in three
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_height": SIZE,
        "sample_width": SIZE,
        "sample_frames": FRAMES,
        "caption_channels": TEXT_DIM,
    },
    _allegro,
)


# Cosmos


def _cosmos(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "fps": 30,
        "return_dict": False,
    }


_COSMOS = ZooModel(
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
        "concat_padding_mask": False,  # a mask is resized by torchvision, no dependency here
    },
    _cosmos,
    LOG_SIGMAS,
)


# EasyAnimate


def _easyanimate(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "timestep": torch.tensor([timestep] * batch),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


_EASYANIMATE = ZooModel(
    "EasyAnimateTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 2,
        "sample_width": SIZE,
        "sample_height": SIZE,
        "num_layers": 4,
        "mmdit_layers": 2,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_DIM,
    },
    _easyanimate,
)


# Kandinsky


def _kandinsky_video(batch: int) -> Tensor:
    """Return latents, no conditions and the mask of none, channels last."""
    return _conditioned_video(batch, CHANNELS, 1).permute(0, 2, 3, 4, 1).contiguous()


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
        "return_dict": True,  # without one, it returns no tuple, but the tensor
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
    """Condition on nothing but anchors: there is no text, and 8 x 8 tokens are the least."""
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

_KANDINSKY_5 = ZooModel(
    "Kandinsky5Transformer3DModel", {**_KANDINSKY_CONFIG, **_KANDINSKY_TEXT_CONFIG}, _kandinsky_5
)
_KANDINSKY_6 = ZooModel(
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
)
_KANDINSKY_6_SR = ZooModel("Kandinsky6SRTransformer3DModel", _KANDINSKY_CONFIG, _kandinsky_6_sr)


# MiniMax H3

_H3_AUDIO = 8  # rows of two channels


def _minimax_h3(batch: int, timestep: float) -> dict[str, Any]:
    """Pack rows of text, audio and video; audio is a little noisier."""
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
    position_ids[video_start:] = torch.stack(_grid_positions(), dim=-1).double() * 8
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


_MINIMAX_H3 = ZooModel(
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
)


# Motif


def _motif(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _conditioned_video(batch, CHANNELS, 1),
        "timestep": steps(batch, timestep),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch, torch.bool),
    }


_MOTIF = ZooModel(
    "MotifVideoTransformer3DModel",
    {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "rope_axes_dim": (4, 6, 6),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
    _motif,
)


# SANA


def _sana(batch: int, timestep: float) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch, timestep, torch.int64),
        "return_dict": False,
        "attention_kwargs": None,
    }


def _sana_wm(batch: int, timestep: float) -> dict[str, Any]:
    """Move a camera forwards from the first frame, which is given and thus without noise."""
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, 2, 3] = 0.1 * torch.arange(FRAMES)
    intrinsics = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(FRAMES, -1)
    cameras = torch.cat([poses.flatten(1), intrinsics], dim=1)
    return {
        "hidden_states": latents(batch, CHANNELS, FRAMES, GRID, GRID),
        "timestep": torch.tensor([0.0, timestep, timestep]).expand(batch, 1, FRAMES),
        "encoder_hidden_states": text(batch).unsqueeze(1),
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
        "mask": text_mask(batch),
        "camera_conditions": cameras.repeat(batch, 1, 1),
        "chunk_plucker": noise(2, 1, 12, FRAMES, GRID, GRID).repeat(batch, 1, 1, 1, 1),
    }


_SANA = ZooModel(
    "SanaVideoTransformer3DModel",
    {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "caption_channels": TEXT_DIM,
        "mlp_ratio": 2.0,
        "rope_max_seq_len": 32,
    },
    _sana,
)
_SANA_WM = ZooModel(
    "SanaWMTransformer3DModel",
    {
        "in_channels": CHANNELS,
        "num_layers": 4,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "chunk_plucker_channels": 12,
        "caption_channels": TEXT_DIM,
        "mlp_ratio": 2.0,
    },
    _sana_wm,
)


VIDEO_MODELS: tuple[ZooModel, ...] = (
    _LATTE,
    _COGVIDEOX,
    _LTX,
    _WAN,
    _HUNYUAN,
    _MOCHI,
    _ALLEGRO,
    _CONSISID,
    _COSMOS,
    _EASYANIMATE,
    _HELIOS,
    _HUNYUAN_15,
    _FRAMEPACK,
    _KANDINSKY_5,
    _KANDINSKY_6,
    _KANDINSKY_6_SR,
    _LTX2,
    _MINIMAX_H3,
    _MOTIF,
    _SANA,
    _SANA_WM,
    _SANA_WM_REFINER,
    _SKYREELS,
    _WAN_VACE,
    _WAN_ANIMATE,
    _WAN_ANIMATE_2,
    _CHRONOEDIT,
    _ANYFLOW,
    _ANYFLOW_FAR,
)
