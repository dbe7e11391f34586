"""Build real diffusers pipelines, tiny and with random weights, without any download.

Each can be saved, loaded back and run on one CPU thread within a second.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from ditfastattn.tools.zoo.families import z_image
from tests.helpers import randomize

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
CLIP_DIM = 16
T5_DIM = 2 * CLIP_DIM  # SD3 lays two CLIP encoders side by side and pads them to this
CLIP_LENGTH = 16
LETTERS = string.ascii_lowercase + string.digits
Module = TypeVar("Module", bound=torch.nn.Module)
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def tiny_dit_pipeline() -> DiTPipeline:
    """Return a class-conditional pipeline; diffusers has its null class at 1000."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        **HEADS, num_layers=2, in_channels=4, out_channels=8, sample_size=8
    )
    labels = {0: "cat, kitty", 1: "dog", 2: "bird"}
    scheduler: Any = DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(_random(transformer), _image_vae(), scheduler, id2label=labels)
    # Published pipelines have the labels in their index; diffusers itself forgets to save them.
    pipeline.register_to_config(id2label=labels)  # type: ignore[no-untyped-call]  # diffusers
    return _quiet(pipeline)


def tiny_pixart_pipeline() -> PixArtSigmaPipeline:
    """Return a pipeline with cross-attention to masked text."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        **HEADS,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=T5_DIM,
    )
    scheduler: Any = DPMSolverMultistepScheduler()
    return _quiet(
        PixArtSigmaPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(),
            vae=_image_vae(),
            transformer=_random(transformer),
            scheduler=scheduler,
        )
    )


def tiny_sd3_pipeline() -> StableDiffusion3Pipeline:
    """Return a pipeline with joint attention and all three text encoders."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        **HEADS,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        pos_embed_max_size=8,
        joint_attention_dim=T5_DIM,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_DIM,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=_random(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_image_vae(),
            text_encoder=_random(CLIPTextModelWithProjection(_clip_config())),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_random(CLIPTextModelWithProjection(_clip_config())),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(),
            tokenizer_3=_t5_tokenizer(),
        )
    )


def tiny_flux_pipeline() -> FluxPipeline:
    """Return a pipeline of one double and one single block, with guidance as an input."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,  # 2x2 patches of 4 channels
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=CLIP_DIM,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_image_vae(),
            text_encoder=_random(CLIPTextModel(_clip_config())),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
            transformer=_random(transformer),
        )
    )


def tiny_flux_img2img_pipeline() -> FluxImg2ImgPipeline:
    """Return a pipeline of the components of ``tiny_flux_pipeline``."""
    pipeline: FluxImg2ImgPipeline = FluxImg2ImgPipeline.from_pipe(  # type: ignore[no-untyped-call]
        tiny_flux_pipeline()
    )
    return _quiet(pipeline)


def tiny_wan_pipeline() -> WanPipeline:
    """Return a video pipeline that calls its transformer once per guidance half."""
    return _wan()


def tiny_wan_image_pipeline() -> WanImageToVideoPipeline:
    """Return a pipeline that goes on from an image: each token has a timestep of its own."""
    parts = dict(tiny_wan_pipeline().components)
    pipeline: WanImageToVideoPipeline = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    return _quiet(pipeline)


def tiny_unet_pipeline() -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion's first kind, whose denoiser is a U-Net."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=CLIP_DIM,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler: Any = DDIMScheduler(clip_sample=False)
    nothing: Any = None
    return _quiet(
        StableDiffusionPipeline(
            vae=_image_vae(),
            text_encoder=_random(CLIPTextModel(_clip_config())),
            tokenizer=_clip_tokenizer(),
            unet=_random(unet),
            scheduler=scheduler,
            safety_checker=nothing,
            feature_extractor=nothing,
            requires_safety_checker=False,
        )
    )


def tiny_two_stage_wan_pipeline() -> WanPipeline:
    """Return the same of two transformers: the second one takes the low-noise steps over."""
    return _wan(transformer_2=_wan_transformer(1), boundary_ratio=0.8)


def _wan_transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    transformer: WanTransformer3DModel = WanTransformer3DModel(
        **HEADS,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        text_dim=T5_DIM,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
    )
    return _random(transformer)


def _wan(**stages: Any) -> WanPipeline:
    transformer = _wan_transformer(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[-0.2, 0.1, 0.3, 0.0],
        latents_std=[1.5, 1.0, 2.0, 1.2],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    text_encoder = UMT5EncoderModel(UMT5Config(**_t5_sizes()))
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    tokenizer: Any = _t5_tokenizer()  # diffusers says AutoTokenizer, which nothing is
    return _quiet(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=_random(text_encoder),
            vae=_random(vae),
            scheduler=scheduler,
            transformer=transformer,
            **stages,
        )
    )


def tiny_qwenimage_pipeline() -> QwenImagePipeline:
    """Return a pipeline with joint attention that calls its transformer per guidance half."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        **HEADS,
        num_layers=2,
        in_channels=16,  # 2x2 patches of 4 channels
        out_channels=4,
        joint_attention_dim=T5_DIM,
        axes_dims_rope=(4, 2, 2),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.2, 0.1, 0.3, 0.0],
        latents_std=[1.5, 1.0, 2.0, 1.2],
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_random(vae),
        text_encoder=_qwen(),
        tokenizer=_qwen_tokenizer(),
        transformer=_random(transformer),
    )
    return _quiet(pipeline)


def tiny_ltx_pipeline() -> LTXPipeline:
    """Return a video pipeline of self- and cross-attention, both guidance halves in one call."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=T5_DIM,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return _quiet(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_random(vae),
            text_encoder=_t5(),
            tokenizer=_t5_tokenizer(),
            transformer=_random(transformer),
        )
    )


def tiny_cogvideox_pipeline() -> CogVideoXPipeline:
    """Return a video pipeline that calls its transformer once for both guidance halves."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,  # the least whose quarter and three eighths are even, as rope needs
        num_layers=2,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=T5_DIM,
        max_text_seq_length=8,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    made: Any = AutoencoderKLCogVideoX  # its annotations allow one block only
    vae = made(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=32,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return _quiet(
        CogVideoXPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(),
            vae=_random(vae),
            transformer=_random(transformer),
            scheduler=scheduler,
        )
    )


def tiny_z_image_pipeline() -> ZImagePipeline:
    """Return a pipeline that gives its transformer a list of images, each with its prompt.

    It has no text encoder: prompts are given as ``prompt_embeds`` of any lengths.
    """
    (zoo,) = z_image.MODELS
    nothing: Any = None
    transformer: Any = zoo.build()
    return _quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_image_vae(),
            text_encoder=nothing,
            tokenizer=nothing,
            transformer=transformer,
        )
    )


def _image_vae() -> AutoencoderKL:
    """Return an autoencoder that makes 8x8 latents of 32x32 pixels."""
    made: Any = AutoencoderKL  # its annotations allow one block only
    vae: AutoencoderKL = made(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
    return _random(vae)


def _t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer that knows some words and spells the others."""
    words = ["a", "cat", "dog", "of", "on", "photo", "red", "runs", "sits", "the"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]  # each starts with SentencePiece's space
    pieces += [(letter, -5.0) for letter in f"▁{LETTERS}"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def _t5_sizes() -> dict[str, Any]:
    vocab_size = len(_t5_tokenizer())
    return {
        "vocab_size": vocab_size,
        "d_model": T5_DIM,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
    }


def _t5() -> T5EncoderModel:
    return _random(T5EncoderModel(T5Config(**_t5_sizes())))


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer that spells every word."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_LENGTH)


def _clip_config() -> CLIPTextConfig:
    tokenizer: Any = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_DIM,
        intermediate_size=32,
        projection_dim=CLIP_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer that spells prompts, and has the words of the pipeline's template.

    Of a prompt in its template the pipeline drops the first 34 tokens: all that stand before it.
    """
    tokens = ["<|endoftext|>", "Ġ", "Ċ", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_tokens(re.findall(r"<\|\w+\|>| ?\w+", _QWEN_TEMPLATE))
    return tokenizer


_QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)


def _qwen() -> Qwen2_5_VLForConditionalGeneration:
    tokenizer: Any = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": T5_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": T5_DIM,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return _random(Qwen2_5_VLForConditionalGeneration(config))


def _random(module: Module) -> Module:
    randomize(module)
    return module


def _quiet(pipeline: Pipeline) -> Pipeline:
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


IMAGE: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 3.0}
PROMPT: dict[str, Any] = {"prompt": "a cat", "max_sequence_length": 8}

# What builds each pipeline, and a small generation's arguments but for its steps and its seed.
TINY_PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "dit": (tiny_dit_pipeline, {"class_labels": [1], "guidance_scale": 3.0}),
    "pixart": (
        tiny_pixart_pipeline,
        IMAGE | PROMPT | {"use_resolution_binning": False, "clean_caption": False},
    ),
    "sd3": (tiny_sd3_pipeline, IMAGE | PROMPT),
    "flux": (tiny_flux_pipeline, IMAGE | PROMPT),
    "wan": (tiny_wan_pipeline, IMAGE | PROMPT | {"num_frames": 5}),
    "cogvideox": (tiny_cogvideox_pipeline, IMAGE | PROMPT | {"num_frames": 9}),
    "ltx": (tiny_ltx_pipeline, IMAGE | PROMPT | {"num_frames": 5}),
    "qwenimage": (
        tiny_qwenimage_pipeline,
        PROMPT
        | {"height": 32, "width": 32, "negative_prompt": "a dog", "true_cfg_scale": 3.0}
        | {"max_sequence_length": 16},
    ),
}

# As above, for ``tiny_flux_img2img_pipeline``: it skips the first quarter of the steps.
IMG2IMG_ARGUMENTS: dict[str, Any] = (
    IMAGE
    | PROMPT
    | {"image": torch.linspace(0.0, 1.0, 3 * 32 * 32).reshape(1, 3, 32, 32), "strength": 0.75}
)


def load_saved(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of ``TINY_PIPELINES`` saved in ``folder`` and loaded, and its call."""
    build, call = TINY_PIPELINES[name]
    if not (folder / name).exists():
        build().save_pretrained(folder / name)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, call
