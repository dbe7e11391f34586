"""Inputs shared by video transformers, some by audio ones: latents, text, positions, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ditfastattn.tools.zoo.base import latents, noise

FRAMES, SIZE = 3, 8  # latents of 3 frames, 8 x 8: 48 tokens in patches of 1 x 2 x 2
GRID = SIZE // 2
TOKENS = FRAMES * GRID * GRID
CHANNELS = 4  # of latents
WIDTH = 32  # of the residual stream: 2 heads of 16, except where rope needs another head
TEXT_TOKENS, TEXT_DIM = 6, 16
SIGMAS = (0.9, 0.7, 0.5, 0.3)
RISING_SIGMAS = (0.1, 0.3, 0.5, 0.7)  # of models whose time runs from noise, 0, to data, 1
RISING_STEPS = (100.0, 300.0, 500.0, 700.0)
LOG_SIGMAS = (1.0, 0.6, 0.2, -0.2)  # a quarter of log sigma, as EDM's schedulers have it


def steps(batch: int, timestep: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the timestep of each sample, expanded as pipelines expand it."""
    return torch.tensor(timestep).to(dtype).expand(batch)


def text(batch: int, tokens: int = TEXT_TOKENS, channels: int = TEXT_DIM) -> Tensor:
    """Return prompt embeddings, different in each sample."""
    return noise(1, batch, tokens, channels)


def text_mask(
    batch: int, dtype: torch.dtype = torch.int64, tokens: int = TEXT_TOKENS, masked: int = 2
) -> Tensor:
    """Return a mask that is 1 at valid tokens: samples 0, 2, ... have fewer."""
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


def video(batch: int, channels: int = CHANNELS) -> Tensor:
    """Return latents ``[batch, channels, 3, 8, 8]``."""
    return latents(batch, channels, FRAMES, SIZE, SIZE)


def conditioned_video(batch: int, *channels: int, size: int = SIZE) -> Tensor:
    """Return latents joined with ``channels`` of conditions, zeros as in text-to-video."""
    shape = (FRAMES, size, size)
    zeros = [torch.zeros(batch, count, *shape) for count in channels]
    return torch.cat([latents(batch, CHANNELS, *shape), *zeros], dim=1)


def grid_positions() -> tuple[Tensor, Tensor, Tensor]:
    """Return the frame, row and column of every token."""
    axes = torch.meshgrid(
        torch.arange(FRAMES), torch.arange(GRID), torch.arange(GRID), indexing="ij"
    )
    frames, rows, columns = (axis.flatten() for axis in axes)
    return frames, rows, columns


def history() -> tuple[Tensor, ...]:
    """Return the indices of an image's frame, of history in three resolutions, and of latents."""
    indices = torch.arange(8 + FRAMES)
    prefix, long, middle, short, current = torch.split_with_sizes(indices, [1, 4, 2, 1, FRAMES])
    return torch.cat([prefix, short]), middle, long, current
