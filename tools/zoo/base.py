"""Describe one tiny model: a class of diffusers, a configuration, and a step's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[
    [int, float], dict[str, Any]
]  # (batch, timestep) -> the forward's keyword arguments


@dataclass(frozen=True)
class ZooModel:
    """Hold how to build and call one class of diffusers with few, random weights.

    ``call(batch, timestep)`` returns the keyword arguments of one denoising step, the same for the
    same arguments: latents that both halves of the batch share, as batched guidance has them, and
    conditions that differ between lanes. ``batch`` is even, or 1.
    """

    name: str  # of the class, as diffusers exports it
    config: dict[str, Any]
    call: Call
    timesteps: tuple[float, ...] = field(default=(900.0, 700.0, 500.0, 300.0))
    argument: str = "timestep"  # the forward's name of it

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model in eval mode, weights random, none of its gates zero."""
        import diffusers

        torch.manual_seed(seed)
        model: torch.nn.Module = getattr(diffusers, self.name)(**self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any() or not parameter.isfinite().all():
                    parameter.normal_(0.0, 0.1)
        return model.eval()


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal noise that ``seed`` fixes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch: int, *shape: int) -> Tensor:
    """Return latents ``[batch, *shape]``, the same in both halves of an even batch."""
    if batch % 2:
        return noise(0, batch, *shape)
    return torch.cat([noise(0, batch // 2, *shape)] * 2)
