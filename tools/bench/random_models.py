"""Models of published sizes with random weights, to measure speed.

Their images mean nothing: only seconds and speedups are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model: its class, configuration and inputs.

    Attributes:
        make: the transformer's class.
        config: its configuration.
        shape: the shape of one image's latents.
        conditions: the shapes, without the batch, of random conditions, by argument name.
        text: the number of text tokens.
        flow: whether it is sampled by flow matching.
        guided: whether guidance doubles the batch.
    """

    make: Callable[..., torch.nn.Module]
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    conditions: Mapping[str, tuple[int, ...]]
    text: int = 0
    flow: bool = False
    guided: bool = True


class RandomPipeline(DiffusionPipeline):
    """Sample with a transformer as its own pipeline would, without text encoder and decoder."""

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]  # the base says None
    transformer: Any
    scheduler: Any

    architecture: Architecture

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        """Register the modules; ``architecture`` is not a module and is set afterwards."""
        super().__init__()
        self.register_modules(  # type: ignore[no-untyped-call]  # diffusers has no annotation
            transformer=transformer, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        image: list[int],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor]:
        """Return the latents as images ``[B, 3, H, W]`` in [0, 1], one per entry of ``image``."""
        made, device = self.architecture, self._execution_device
        dtype, batch = self.transformer.dtype, len(image)
        guided = made.guided and guidance_scale != 1.0
        guided_batch = 2 * batch if guided else batch
        latents: Tensor = randn_tensor((batch, *made.shape), generator, device=device, dtype=dtype)
        conditions = self.conditions(guided_batch, generator, device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guided else latents
            noise = self.transformer(
                doubled,
                timestep=timestep.expand(guided_batch) / (1.0 if made.guided else 1000.0),
                return_dict=False,
                **conditions,
            )[0]
            if noise.shape[1] == 2 * latents.shape[1] and not made.flow:
                noise = noise.chunk(2, dim=1)[0]  # the other half is the learned variance
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return (_picture(latents),)

    def conditions(
        self, count: int, generator: torch.Generator | None, device: Any, dtype: torch.dtype
    ) -> Arguments:
        """Return what the transformer is called with, beside latents and timestep."""
        made = self.architecture
        found: Arguments = {}
        for name, shape in made.conditions.items():
            if name == "class_labels":
                found[name] = torch.arange(count, device=device) % 1000
            else:
                full = (count, *shape)
                found[name] = randn_tensor(full, generator, device=device, dtype=dtype)
        if made.make is PixArtTransformer2DModel:
            found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            found["encoder_attention_mask"] = torch.ones(count, made.text, device=device)
        if made.make is FluxTransformer2DModel:
            found["img_ids"] = _image_ids(made.shape[0]).to(device, dtype)
            found["txt_ids"] = torch.zeros(made.text, 3, device=device, dtype=dtype)
            found["guidance"] = torch.full((count,), 3.5, device=device)
        return found


def _image_ids(tokens: int) -> Tensor:
    side = round(tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(tokens, 3)


def _picture(latents: Tensor) -> Tensor:
    if latents.ndim == 3:  # packed: tokens and channels
        side = round(latents.shape[1] ** 0.5)
        latents = latents.transpose(1, 2).reshape(len(latents), -1, side, side)
    return latents[:, :3].float().sigmoid()


def random_pipeline(architecture: Architecture) -> RandomPipeline:
    """Return a pipeline with random weights: in bfloat16 on a GPU, else in fp32."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    with torch.device(device):
        transformer = architecture.make(**architecture.config).eval()
    if dtype is not torch.float32:
        transformer = transformer.to(dtype)
    scheduler: Any = (
        FlowMatchEulerDiscreteScheduler() if architecture.flow else DPMSolverMultistepScheduler()
    )
    pipeline = RandomPipeline(transformer, scheduler)
    pipeline.architecture = architecture
    return pipeline


def dit(sample: int, layers: int, heads: int, head_dim: int) -> Architecture:
    """Return a class-conditional DiT for latents of side ``sample``."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "sample_size": sample,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
    return Architecture(DiTTransformer2DModel, config, (4, sample, sample), {"class_labels": ()})


def pixart(
    sample: int, layers: int, heads: int, head_dim: int, caption: int, text: int
) -> Architecture:
    """Return a PixArt-Sigma for latents of side ``sample``."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "cross_attention_dim": heads * head_dim,
        "sample_size": sample,
        "caption_channels": caption,
        "interpolation_scale": max(sample // 64, 1),
        "use_additional_conditions": False,
        "norm_num_groups": 1,
    }
    conditions = {"encoder_hidden_states": (text, caption)}
    return Architecture(PixArtTransformer2DModel, config, (4, sample, sample), conditions, text)


def sd3(
    sample: int, layers: int, heads: int, head_dim: int, caption: int, pooled: int, text: int
) -> Architecture:
    """Return a Stable Diffusion 3 for latents of side ``sample``."""
    config = {
        "sample_size": sample,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": caption,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": max(192, sample // 2),
    }
    conditions = {"encoder_hidden_states": (text, caption), "pooled_projections": (pooled,)}
    return Architecture(
        SD3Transformer2DModel, config, (16, sample, sample), conditions, text, flow=True
    )


def flux(
    side: int,
    layers: tuple[int, int],
    heads: int,
    axes: tuple[int, int, int],
    caption: int,
    pooled: int,
    text: int,
) -> Architecture:
    """Return a FLUX for ``side * side`` packed tokens; its guidance is distilled."""
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "attention_head_dim": sum(axes),
        "num_attention_heads": heads,
        "joint_attention_dim": caption,
        "pooled_projection_dim": pooled,
        "guidance_embeds": True,
        "axes_dims_rope": axes,
    }
    conditions = {"encoder_hidden_states": (text, caption), "pooled_projections": (pooled,)}
    return Architecture(
        FluxTransformer2DModel,
        config,
        (side * side, 64),
        conditions,
        text,
        flow=True,
        guided=False,
    )


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "dit-xl-512": lambda: dit(64, 28, 16, 72),
    "pixart-sigma-1k": lambda: pixart(128, 28, 16, 72, 4096, 300),
    "pixart-sigma-2k": lambda: pixart(256, 28, 16, 72, 4096, 300),
    "sd3": lambda: sd3(128, 24, 24, 64, 4096, 2048, 333),
    "flux": lambda: flux(64, (19, 38), 24, (16, 56, 56), 4096, 768, 512),
    "dit-tiny": lambda: dit(32, 2, 2, 16),
    "pixart-tiny": lambda: pixart(32, 2, 2, 16, 32, 8),
    "sd3-tiny": lambda: sd3(32, 2, 2, 16, 32, 32, 8),
    "flux-tiny": lambda: flux(16, (1, 2), 2, (4, 6, 6), 32, 32, 8),
}
