"""Find the denoiser of a pipeline: a transformer, or a U-Net."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditfastattn.core.errors import ConfigError


def denoiser_name(pipeline: Any) -> str:
    """Return what ``pipeline`` calls its denoiser: a transformer, or a U-Net."""
    unet = isinstance(getattr(pipeline, "unet", None), nn.Module)
    transformer = isinstance(getattr(pipeline, "transformer", None), nn.Module)
    return "unet" if unet and not transformer else "transformer"


def transformer_of(pipeline: Any, where: str) -> nn.Module:
    """Return the denoiser of ``pipeline``, without a ``torch.compile`` around it.

    Raises:
        ConfigError: the pipeline has none.
    """
    transformer = getattr(pipeline, denoiser_name(pipeline), None)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            "the pipeline has no transformer",
            where=where,
            got=type(pipeline).__name__,
            expected="a diffusers pipeline with a `transformer` module",
        )
    plain: nn.Module = getattr(transformer, "_orig_mod", transformer)
    return plain
