"""Hold tiny configurations of diffusers' image transformers, and what one step of each is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditfastattn.tools.zoo.base import ZooModel, latents, noise

CHANNELS = 4  # of the latents
PACKED = 16  # of an image token that holds a 2x2 patch of the latents
SIDE = 4  # image tokens per side
TEXT = 8  # tokens
FEATURES = 12  # of a text token
CLASSES = 10

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)  # of a head's 16 rotary channels
UNIT = (0.9, 0.7, 0.5, 0.3)  # timesteps that run from 1 to 0
RISING = (0.1, 0.3, 0.5, 0.7)  # timesteps that run from 0 to 1


@dataclass(frozen=True)
class UnfilledModel(ZooModel):
    """Build a class that leaves some of its parameters as ``torch.empty`` made them."""

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model as usual, with those parameters as random as the rest."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
        try:
            return super().build(seed)
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class TwiceGatedModel(ZooModel):
    """Build a class that gates what attention adds twice, with gates that let the text through."""

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model as usual, the modulation of its blocks eight times as strong."""
        model = super().build(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".norm1" in name:
                    parameter.mul_(8.0)
        return model


def floats(batch: int, timestep: float) -> Tensor:
    """Return the timestep of each lane, as flow matching counts them."""
    return torch.full((batch,), timestep)


def steps(batch: int, timestep: float) -> Tensor:
    """Return the timestep of each lane, as the schedulers of discrete steps count them."""
    return torch.full((batch,), int(timestep))


def lengths(batch: int) -> list[int]:
    """Return how many text tokens of each lane are no padding."""
    return [TEXT - (2, 0, 1)[lane % 3] for lane in range(batch)]


def text(batch: int, *layers: int, channels: int = FEATURES, seed: int = 1) -> Tensor:
    """Return text features ``[batch, *layers, TEXT, channels]``, other ones in each lane."""
    return noise(seed, batch, *layers, TEXT, channels)


def mask(batch: int) -> Tensor:
    """Return the mask ``[batch, TEXT]`` that a tokenizer returns, 1 where a token is no padding."""
    return (torch.arange(TEXT) < torch.tensor(lengths(batch))[:, None]).long()


def grid(first: float = 0.0, start: float = 0.0) -> Tensor:
    """Return the position ids ``[16, 3]`` of the image tokens, as FLUX counts them."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ids = [torch.full((SIDE, SIDE), first), rows + start, columns + start]
    return torch.stack(ids, dim=-1).reshape(-1, 3)


def diagonal() -> Tensor:
    """Return position ids ``[TEXT, 3]`` that count text tokens on both axes of the image."""
    return torch.arange(float(TEXT))[:, None] * torch.tensor([0.0, 1.0, 1.0])


def positions(height: int = 1, width: int = 1, length: int = 1) -> Tensor:
    """Return position ids ``[tokens, 4]`` over time, height, width and text, as FLUX.2 has them."""
    sides = (1, height, width, length)
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))


def square(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with latents ``[batch, 4, 8, 8]`` and text."""
    return {
        "hidden_states": latents(batch, CHANNELS, 2 * SIDE, 2 * SIDE),
        "timestep": floats(batch, timestep),
        "encoder_hidden_states": text(batch),
        "return_dict": False,
    }


def small(batch: int, timestep: float, channels: int = PACKED) -> dict[str, Any]:
    """Return a call with latents ``[batch, channels, 4, 4]``, each place a token, and text."""
    return square(batch, timestep) | {"hidden_states": latents(batch, channels, SIDE, SIDE)}


def packed(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with 16 packed image tokens and text."""
    return square(batch, timestep) | {"hidden_states": latents(batch, SIDE * SIDE, PACKED)}


def flux_ids(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with packed tokens and the position ids of FLUX.1."""
    return packed(batch, timestep) | {"txt_ids": torch.zeros(TEXT, 3), "img_ids": grid()}


def guidance(batch: int) -> dict[str, Any]:
    """Return the guidance scale that models distilled from guidance read."""
    return {"guidance": torch.full((batch,), 3.5)}


def labels(batch: int) -> dict[str, Any]:
    """Return classes, of which the second half of an even batch is the null class."""
    classes = torch.arange(batch) + 1
    classes[batch - batch // 2 :] = CLASSES
    return {"class_labels": classes}


def sizes(batch: int, *names: str) -> dict[str, Any]:
    """Return an image size in pixels, or the corner of its crop, under each of ``names``."""
    values = {"original_size": 64.0, "target_size": 64.0, "crop_coords": 0.0}
    return {name: torch.full((batch, 2), values[name]) for name in names}


def call_dit(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of DiT: classes instead of text."""
    call = square(batch, timestep) | labels(batch) | {"timestep": steps(batch, timestep)}
    del call["encoder_hidden_states"]
    return call


def call_pixart(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of PixArt below its largest resolution, which alone reads sizes."""
    return square(batch, timestep) | {
        "timestep": steps(batch, timestep),
        "encoder_attention_mask": mask(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def call_sd3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Stable Diffusion 3."""
    return square(batch, timestep) | {"pooled_projections": noise(2, batch, FEATURES)}


def call_flux(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.1 [dev]."""
    pooled = {"pooled_projections": noise(2, batch, FEATURES)}
    return flux_ids(batch, timestep) | guidance(batch) | pooled


def call_flux2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.2 [dev], whose position ids have a batch."""
    ids = {"txt_ids": positions(length=TEXT), "img_ids": positions(SIDE, SIDE)}
    batched = {name: value.expand(batch, -1, -1) for name, value in ids.items()}
    return packed(batch, timestep) | guidance(batch) | batched


def call_qwen(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Qwen-Image."""
    return packed(batch, timestep) | {
        "encoder_hidden_states_mask": mask(batch),
        "img_shapes": [[(1, SIDE, SIDE)]] * batch,
    }


def call_lumina2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Lumina 2, whose timesteps run from 0 to 1."""
    return square(batch, timestep) | {"encoder_attention_mask": mask(batch)}


def call_hunyuan(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HunyuanDiT, which reads two text encoders."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return square(batch, timestep) | {
        "text_embedding_mask": mask(batch),
        "encoder_hidden_states_t5": text(batch, channels=16, seed=2),
        "text_embedding_mask_t5": mask(batch),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * batch),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (SIDE, SIDE)),
    }


def call_sana(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of SANA."""
    return small(batch, timestep, CHANNELS) | {"encoder_attention_mask": mask(batch)}


def call_cogview4(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of CogView 4."""
    return square(batch, timestep) | sizes(batch, "original_size", "target_size", "crop_coords")


def call_cogview3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of CogView 3 Plus."""
    return call_cogview4(batch, timestep) | {"timestep": steps(batch, timestep)}


def call_z_image(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Z-Image: lists with one tensor per lane; so is the first of its outputs."""
    images = latents(batch, CHANNELS, 2 * SIDE, 2 * SIDE).unsqueeze(2)
    captions = zip(text(batch), lengths(batch), strict=True)
    return {
        "x": list(images.unbind()),
        "t": floats(batch, timestep),
        "cap_feats": [caption[:length] for caption, length in captions],
        "return_dict": False,
    }


def call_omnigen(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of OmniGen without input images: left-padded text, the time, the image."""
    valid = mask(batch).flip(1)
    padding = TEXT - valid.sum(dim=1)
    index = torch.arange(TEXT + 1 + SIDE * SIDE)
    row, column = index[:, None], index[None, :]
    pads = padding[:, None, None]
    allowed = ((column <= row) | (row > TEXT)) & (column >= pads) | (row < pads)
    call = square(batch, timestep) | {
        "input_ids": (torch.arange(batch * TEXT).reshape(batch, TEXT) % 31 + 1) * valid,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": allowed.float(),
        "position_ids": (index - padding[:, None]).clamp(min=0),
    }
    del call["encoder_hidden_states"]
    return call


def call_lumina_next(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Lumina-Next, whose rotary embedding is complex."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary: Any = get_2d_rotary_pos_embed_lumina  # diffusers has no annotation here
    return square(batch, timestep) | {
        "encoder_mask": mask(batch),
        "image_rotary_emb": rotary(16, 2 * SIDE, 2 * SIDE),
        "cross_attention_kwargs": {"base_sequence_length": SIDE * SIDE},
    }


def call_chroma(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Chroma, whose mask is of floats, which the attention adds to its scores."""
    seen = torch.cat([mask(batch).float(), torch.ones(batch, SIDE * SIDE)], dim=1)
    return flux_ids(batch, timestep) | {"attention_mask": seen}


def call_fibo(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FIBO, which reads one layer of the text encoder per block."""
    seen = torch.cat([mask(batch).bool(), torch.ones(batch, SIDE * SIDE, dtype=torch.bool)], dim=1)
    return flux_ids(batch, timestep) | {
        "text_encoder_layers": list(noise(2, 4, batch, TEXT, FEATURES).unbind()),
        "joint_attention_kwargs": {"attention_mask": seen[:, None, None, :]},
    }


def call_fibo2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FIBO 2: text for the perceiver, and for each block that reads it again."""
    return square(batch, timestep) | {
        "encoder_hidden_states": text(batch, 3),
        "encoder_attention_mask": mask(batch).bool(),
    }


def call_hidream(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HiDream, which has the layers of a text encoder before the batch."""
    return {
        "hidden_states": latents(batch, CHANNELS, 2 * SIDE, 2 * SIDE),
        "timesteps": floats(batch, timestep),
        "encoder_hidden_states_t5": text(batch),
        "encoder_hidden_states_llama3": noise(2, 4, batch, TEXT, FEATURES),
        "pooled_embeds": noise(3, batch, FEATURES),
        "return_dict": False,
    }


def call_hunyuan_image(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of HunyuanImage without glyphs, whose projection alone has 4M weights."""
    return small(batch, timestep) | {"encoder_attention_mask": mask(batch)}


def call_ernie(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of ERNIE-Image."""
    call = small(batch, timestep)
    words = call.pop("encoder_hidden_states") * mask(batch)[:, :, None]
    return call | {"text_bth": words, "text_lens": torch.tensor(lengths(batch))}


def call_glm(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of GLM-Image, the tokens it starts from dropped in the guiding half."""
    dropped = torch.arange(batch) >= batch - batch // 2
    return square(batch, timestep) | {
        "prior_token_id": torch.arange(SIDE * SIDE).repeat(batch, 1),
        "prior_token_drop": dropped[:, None].repeat(1, SIDE * SIDE),
        **sizes(batch, "target_size", "crop_coords"),
    }


def call_longcat(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of LongCat-Image."""
    ids = {"txt_ids": diagonal(), "img_ids": grid(1.0, float(TEXT))}
    return packed(batch, timestep) | ids


def call_ovis(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Ovis-Image."""
    return packed(batch, timestep) | {"txt_ids": diagonal(), "img_ids": grid()}


def call_prx(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of PRX."""
    return square(batch, timestep) | {"attention_mask": mask(batch).bool()}


def call_nucleus(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Nucleus-Image."""
    return call_qwen(batch, timestep) | {"img_shapes": [(1, SIDE, SIDE)] * batch}


def call_ideogram(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Ideogram 4: one sequence of padding, text and image tokens."""
    valid = mask(batch).flip(1)
    padding = TEXT - valid.sum(dim=1)
    words = (torch.arange(TEXT) - padding[:, None]).clamp(min=0)
    places = grid().long() + 65536
    image = latents(batch, SIDE * SIDE, PACKED)
    tokens = torch.full((batch, SIDE * SIDE), 2)
    return {
        "hidden_states": torch.cat([torch.zeros(batch, TEXT, PACKED), image], dim=1),
        "timestep": floats(batch, timestep),
        "encoder_hidden_states": torch.nn.functional.pad(text(batch), (0, 0, 0, SIDE * SIDE)),
        "position_ids": torch.cat(
            [words[:, :, None].expand(-1, -1, 3), places.expand(batch, -1, -1)], dim=1
        ),
        "segment_ids": torch.cat([2 * valid - 1, torch.ones_like(tokens)], dim=1),
        "indicator": torch.cat([3 * valid, tokens], dim=1),
        "return_dict": False,
    }


def call_krea2(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Krea 2, which fuses several layers of the text encoder."""
    return packed(batch, timestep) | {
        "encoder_hidden_states": noise(1, batch, TEXT, 3, 16),
        "encoder_attention_mask": mask(batch).bool(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid()]),
    }


def call_dreamlite(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of DreamLite's transformer, which the blocks of its U-Net hold.

    There its norms know no timestep; here they read it, and classes with it.
    """
    return (
        small(batch, timestep)
        | labels(batch)
        | {"timestep": steps(batch, timestep), "encoder_attention_mask": mask(batch)}
    )


def call_joy(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of JoyImage-Edit: the latents of the image to edit, then the noise."""
    pair = latents(batch, 2, CHANNELS, 1, 2 * SIDE, 2 * SIDE)
    return square(batch, timestep) | {"hidden_states": pair}


def call_joy_plus(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of JoyImage-Edit-Plus: patches of the noise, then of the image to edit."""
    return square(batch, timestep) | {
        "hidden_states": latents(batch, SIDE * SIDE + 4, CHANNELS, 1, 2, 2),
        "encoder_hidden_states_mask": mask(batch),
        "shape_list": [[(1, SIDE, SIDE), (1, 2, 2)]] * batch,
    }


def call_qwen21(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of Qwen-Image 2.1 without its cache; each slot stands for 4 image tokens."""
    slots = torch.arange(TEXT + SIDE) >= TEXT
    return call_qwen(batch, timestep) | {"img_mask": slots.repeat(batch, 1)}


def call_flux3(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call of FLUX.3 with a reference image."""
    scale = torch.tensor([1.0, 0.5, 0.5, 1.0])
    return packed(batch, timestep) | {
        "txt_ids": positions(length=TEXT).float(),
        "img_ids": positions(SIDE, SIDE) * scale,
        "image_cond_hidden_states": latents(batch, 4, PACKED),
        "image_cond_ids": positions(2, 2) * scale - torch.tensor([0.0, 0.0, 0.0, 1.0]),
    }


DIT: Mapping[str, Any] = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "sample_size": 2 * SIDE,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
}
FLUX: Mapping[str, Any] = {
    **HEADS,
    "in_channels": PACKED,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": FEATURES,
    "axes_dims_rope": AXES,
}
COGVIEW: Mapping[str, Any] = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "text_embed_dim": FEATURES,
    "time_embed_dim": 32,
    "condition_dim": 8,
}
JOY: Mapping[str, Any] = {
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": FEATURES,
    "num_layers": 2,
    "rope_dim_list": list(AXES),
}

IMAGE_MODELS: tuple[ZooModel, ...] = (
    ZooModel("DiTTransformer2DModel", {**DIT}, call_dit),
    ZooModel(
        "PixArtTransformer2DModel",
        {**DIT, "cross_attention_dim": 32, "caption_channels": FEATURES},
        call_pixart,
    ),
    ZooModel(
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 2 * SIDE,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "joint_attention_dim": FEATURES,
            "caption_projection_dim": 32,
            "pooled_projection_dim": FEATURES,
            "pos_embed_max_size": 2 * SIDE,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        call_sd3,
    ),
    ZooModel(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": FEATURES, "guidance_embeds": True},
        call_flux,
        UNIT,
    ),
    ZooModel(
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        call_flux2,
        UNIT,
    ),
    ZooModel(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "joint_attention_dim": FEATURES,
            "axes_dims_rope": AXES,
        },
        call_qwen,
        UNIT,
    ),
    ZooModel(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 2 * SIDE,
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": AXES,
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": FEATURES,
        },
        call_lumina2,
        RISING,
    ),
    ZooModel(
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": CHANNELS,
            "patch_size": 2,
            "sample_size": 2 * SIDE,
            "hidden_size": 32,
            "num_layers": 4,  # the last takes what the first skips
            "cross_attention_dim": FEATURES,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        call_hunyuan,
    ),
    ZooModel(
        "SanaTransformer2DModel",
        {
            **HEADS,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": FEATURES,
            "sample_size": SIDE,
        },
        call_sana,
    ),
    TwiceGatedModel(
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 2 * SIDE,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": FEATURES,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        square,
        UNIT,
    ),
    ZooModel(
        "CogView4Transformer2DModel",
        {**COGVIEW, "rope_axes_dim": (16, 16)},
        call_cogview4,
    ),
    ZooModel(
        "ZImageTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": FEATURES,
            "axes_dims": list(AXES),
            "axes_lens": [128, 16, 16],
        },
        call_z_image,
        RISING,
        "t",
    ),
    ZooModel(
        "OmniGenTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "pos_embed_max_size": 8,
        },
        call_omnigen,
        RISING,
    ),
    ZooModel("CogView3PlusTransformer2DModel", {**COGVIEW, "pos_embed_max_size": 8}, call_cogview3),
    UnfilledModel(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 2 * SIDE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": FEATURES,
        },
        call_lumina_next,
        RISING,
    ),
    ZooModel(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "approximator_num_channels": 32,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        call_chroma,
        UNIT,
    ),
    ZooModel("BriaTransformer2DModel", {**FLUX}, flux_ids),
    ZooModel("BriaFiboTransformer2DModel", {**FLUX, "text_encoder_dim": FEATURES}, call_fibo),
    ZooModel(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": CHANNELS,
            "dim": 32,
            "n_layers": 4,
            "n_heads": 2,
            "cap_feat_dim": FEATURES,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": TEXT,
            "axes_dims": AXES,
            "axes_lens": (32, 16, 16),
        },
        call_fibo2,
        UNIT,
    ),
    ZooModel(
        "HiDreamImageTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [FEATURES, FEATURES],
            "text_emb_dim": FEATURES,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (2 * SIDE, 2 * SIDE),
            "llama_layers": [0, 1, 2, 3],
        },
        call_hidream,
        argument="timesteps",
    ),
    ZooModel(
        "HunyuanImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "num_layers": 2,
            "num_single_layers": 2,
            "text_embed_dim": FEATURES,
            "rope_axes_dim": (8, 8),
        },
        call_hunyuan_image,
    ),
    ZooModel(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "text_in_dim": FEATURES,
            "rope_axes_dim": AXES,
        },
        call_ernie,
    ),
    ZooModel(
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        call_glm,
        (899.0, 699.0, 499.0, 299.0),
    ),
    ZooModel("LongCatImageTransformer2DModel", {**FLUX}, call_longcat, UNIT),
    ZooModel("OvisImageTransformer2DModel", {**FLUX, "out_channels": PACKED}, call_ovis, UNIT),
    ZooModel(
        "PRXTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "context_in_dim": FEATURES,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        call_prx,
        UNIT,
    ),
    UnfilledModel(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "joint_attention_dim": FEATURES,
            "axes_dims_rope": AXES,
            "mlp_ratio": 6.0,  # less would leave the dense block no channels
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        call_nucleus,
        UNIT,
    ),
    ZooModel(
        "Ideogram4Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": FEATURES,
            "mrope_section": (4, 2, 2),
        },
        call_ideogram,
        RISING,
    ),
    ZooModel(
        "Krea2Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "axes_dims_rope": AXES,
        },
        call_krea2,
        UNIT,
    ),
    ZooModel(
        "DreamLiteTransformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": FEATURES,
            "num_embeds_ada_norm": CLASSES,
            "norm_type": "ada_norm_zero",
            "qk_norm": "rms_norm",
        },
        call_dreamlite,
    ),
    ZooModel("JoyImageEditTransformer3DModel", {**JOY}, call_joy),
    ZooModel("JoyImageEditPlusTransformer3DModel", {**JOY}, call_joy_plus),
    ZooModel(
        "QwenImage21Transformer2DModel",
        {
            **HEADS,
            "in_channels": PACKED,
            "out_channels": PACKED,
            "num_layers": 2,
            "context_in_dim": FEATURES,
            "axes_dims_rope": AXES,
        },
        call_qwen21,
        UNIT,
    ),
    ZooModel(
        "Flux3Transformer2DModel",
        {
            **FLUX,
            "cond_in_channels": PACKED,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        call_flux3,
        UNIT,
    ),
    ZooModel(
        "Transformer2DModel",
        {
            **DIT,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
        },
        call_dit,
    ),
)
