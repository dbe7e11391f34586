"""Tiny models: a class of diffusers, a configuration, and the call of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# (batch, timestep) -> the forward's keyword arguments
Call = Callable[[int, float], dict[str, Any]]


@dataclass(frozen=True)
class ZooModel:
    """How to build and call one class of diffusers with few, random weights.

    ``call(batch, timestep)`` returns the keyword arguments of one denoising step and is
    deterministic. As in batched guidance, both halves of the batch have the same latents;
    conditions differ between samples. ``batch`` is even, or 1.
    """

    name: str  # of the class, as diffusers exports it
    config: dict[str, Any]
    call: Call
    timesteps: tuple[float, ...] = field(default=(900.0, 700.0, 500.0, 300.0))
    argument: str = "timestep"  # its name in the forward

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model in eval mode with random weights; no gate is zero."""
        import diffusers

        torch.manual_seed(seed)
        model: torch.nn.Module = getattr(diffusers, self.name)(**self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any() or not parameter.isfinite().all():
                    parameter.normal_(0.0, 0.1)
        return model.eval()


@dataclass(frozen=True)
class UnfilledModel(ZooModel):
    """Build a class that leaves some parameters as ``torch.empty`` made them."""

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model with those parameters random too."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
        try:
            return super().build(seed)
        finally:
            torch.use_deterministic_algorithms(before)


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal noise from ``seed``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch: int, *shape: int) -> Tensor:
    """Return latents ``[batch, *shape]``, the same in both halves of an even batch."""
    if batch % 2:
        return noise(0, batch, *shape)
    return torch.cat([noise(0, batch // 2, *shape)] * 2)
