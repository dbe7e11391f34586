"""Describe what generations are called with, run them, and return their images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError

# Arguments of diffusers' pipelines whose lists are of the whole call, and not of its images.
_WHOLE = frozenset(
    {
        "callback_on_step_end_tensor_inputs",
        "control_guidance_end",
        "control_guidance_start",
        "controlnet_conditioning_scale",
        "ip_adapter_image",
        "ip_adapter_image_embeds",
        "sigmas",
        "skip_guidance_layers",
        "timesteps",
    }
)
HELD_OUT_SEED = 500  # added to the seed, where held-out prompts repeat the same calls


@dataclass(frozen=True)
class Prompt:
    """Hold what one generation is called with, and the seed of its noise."""

    call: Mapping[str, Any]
    seed: int


def split_prompts(call: Mapping[str, Any], seed: int) -> list[Prompt]:
    """Return one prompt per image of ``call``, whose lists hold an entry per image.

    Lists of values of the schedule, such as ``sigmas``, are of every image.

    Raises:
        ConfigError: lists of different lengths.
    """
    lists = {
        name: item
        for name, item in call.items()
        if isinstance(item, (list, tuple)) and name not in _WHOLE
    }
    lengths = {len(item) for item in lists.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise ConfigError(
            "the lists of a call must have one entry per image",
            where="call",
            got=", ".join(f"{name}: {len(item)}" for name, item in lists.items()),
            expected="lists of the same length, 1 or more",
        )
    count = lengths.pop() if lengths else 1
    return [
        Prompt({**call, **{name: [item[k]] for name, item in lists.items()}}, seed + k)
        for k in range(count)
    ]


def argument_of(pipeline: Any, call: Mapping[str, Any], name: str) -> Any:
    """Return what the pipeline takes for ``name``: the caller's value or its default."""
    if name in call:
        return call[name]
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def generate(pipeline: Any, prompt: Prompt) -> Any:
    """Run one generation without gradients; return what the pipeline returns first: the images.

    Images are requested as tensors in a tuple, where the pipeline has diffusers' arguments for it.
    """
    known = inspect.signature(pipeline.__call__).parameters
    wanted = {"output_type": "pt", "return_dict": False}
    named = {name: item for name, item in wanted.items() if name in known}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(prompt.seed)
        result = pipeline(**{**prompt.call, **named}, generator=generator)
    return result if isinstance(result, Tensor) else result[0]


def as_images(images: Any) -> Tensor:
    """Return images ``[B, C, H, W]`` in fp32 on the CPU; the frames of a video count as images."""
    if not isinstance(images, Tensor) or images.dim() not in (4, 5):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            "the pipeline returned no image tensor",
            where="pipeline(output_type='pt', return_dict=False)[0]",
            got=got,
            expected="[B, C, H, W], or [B, frames, C, H, W]",
        )
    return images.flatten(0, -4).float().cpu()
