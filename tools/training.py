"""What the training scripts of the small models share: one update, the average, image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor


def set_image_size(model: Any, size: int) -> None:
    """Give each patch of a ``size`` x ``size`` image the embedding of its place in the full size.

    ``model`` is a transformer of diffusers with sine-cosine positions; the full size is its
    ``sample_size``.
    """
    patches = size // model.config.patch_size
    embedding = get_2d_sincos_pos_embed(
        model.inner_dim,
        patches,
        base_size=patches,
        interpolation_scale=size / model.config.sample_size,
        output_type="pt",
    )
    model.pos_embed.pos_embed = embedding.float().unsqueeze(0)
    model.pos_embed.height = model.pos_embed.width = patches
    model.height = model.width = patches


def update(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor
) -> None:
    """Take one step of each of ``optimizers``, with clipped gradients."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def make_readable(folder: Path) -> None:
    """Let all read the files in ``folder``: safetensors writes private ones."""
    for file in folder.rglob("*.*"):
        if file.is_file():
            file.chmod(0o644)


@torch.no_grad()
def move_average(average: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Move the ``average`` of the weights towards ``model``."""
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1.0 - decay)
