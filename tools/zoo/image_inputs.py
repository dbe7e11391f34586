"""Inputs shared by image transformers: latents, text, positions, and their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditfastattn.tools.zoo.base import latents, noise

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


def floats(batch: int, timestep: float) -> Tensor:
    """Return the timestep of each sample, as flow matching counts them."""
    return torch.full((batch,), timestep)


def steps(batch: int, timestep: float) -> Tensor:
    """Return the timestep of each sample, as schedulers of discrete steps count them."""
    return torch.full((batch,), int(timestep))


def lengths(batch: int) -> list[int]:
    """Return how many text tokens of each sample are not padding."""
    return [TEXT - (2, 0, 1)[index % 3] for index in range(batch)]


def text(batch: int, *layers: int, channels: int = FEATURES, seed: int = 1) -> Tensor:
    """Return text features ``[batch, *layers, TEXT, channels]``, different in each sample."""
    return noise(seed, batch, *layers, TEXT, channels)


def mask(batch: int) -> Tensor:
    """Return the mask ``[batch, TEXT]`` that a tokenizer returns: 0 at padding, else 1."""
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
    """Return a call with latents ``[batch, channels, 4, 4]``, each position a token, and text."""
    return square(batch, timestep) | {"hidden_states": latents(batch, channels, SIDE, SIDE)}


def packed(batch: int, timestep: float) -> dict[str, Any]:
    """Return a call with 16 packed image tokens and text."""
    return square(batch, timestep) | {"hidden_states": latents(batch, SIDE * SIDE, PACKED)}


def labels(batch: int) -> dict[str, Any]:
    """Return classes, of which the second half of an even batch is the null class."""
    classes = torch.arange(batch) + 1
    classes[batch - batch // 2 :] = CLASSES
    return {"class_labels": classes}
