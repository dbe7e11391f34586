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


def second_of(pipeline: Any) -> nn.Module | None:
    """Return the transformer that takes over the low-noise steps, if there is one."""
    second = getattr(pipeline, "transformer_2", None)
    return second if isinstance(second, nn.Module) else None


def transformer_of(pipeline: Any, where: str) -> nn.Module:
    """Return the denoiser of ``pipeline``, without a ``torch.compile`` around it.

    Raises:
        ConfigError: the pipeline has none.
    """
    transformer = getattr(pipeline, denoiser_name(pipeline), None)
    if transformer is None and second_of(pipeline) is not None:
        raise ConfigError(
            "the pipeline has a transformer_2 alone, and a plan is of `transformer`",
            where=where,
            got=f"{type(pipeline).__name__} with transformer=None",
            expected="a pipeline whose `transformer` is loaded",
            remedy="call it with second_transformer(pipeline), which stands for the second one",
        )
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            "the pipeline has no transformer",
            where=where,
            got=type(pipeline).__name__,
            expected="a diffusers pipeline with a `transformer` module",
        )
    return plain_module(transformer)


def plain_module(module: nn.Module) -> nn.Module:
    """Return ``module`` without a ``torch.compile`` around it."""
    plain: nn.Module = getattr(module, "_orig_mod", module)
    return plain


def never_called(pipeline: Any, where: str) -> ConfigError:
    """Return the error for a generation that did not call the pipeline's ``transformer``."""
    if second_of(pipeline) is None:
        return ConfigError("the pipeline did not call its transformer", where=where)
    return ConfigError(
        "the pipeline called its transformer_2 alone, and a plan is of `transformer`",
        where=where,
        got="every timestep is below the boundary at which transformer_2 takes over",
        expected="a generation that calls `transformer` too",
        remedy="give second_transformer(pipeline), lower boundary_ratio, or begin at an earlier "
        "timestep (more strength or steps)",
    )
