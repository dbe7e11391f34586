"""What the pipelines of the small models share: arguments and their checks, loading, results."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from ditfastattn.core.errors import ConfigError

OutputType = Literal["pt", "np", "pil"]
Loaded = TypeVar("Loaded", bound=DiffusionPipeline)
Generators = torch.Generator | list[torch.Generator] | None


def check_guidance(guidance_scale: float) -> None:
    """Raise ``ConfigError`` unless the scale is finite and at least 1."""
    if not (math.isfinite(guidance_scale) and guidance_scale >= 1.0):
        raise ConfigError(
            "the guidance scale is out of range",
            where="guidance_scale",
            got=guidance_scale,
            expected="a finite number, at least 1.0 (no guidance)",
            remedy="pass 1.0 to switch guidance off",
        )


def check_steps(steps: int, most: int) -> None:
    """Raise ``ConfigError`` unless ``steps`` is an integer from 1 to ``most``."""
    if not is_integer(steps) or not 1 <= steps <= most:
        raise ConfigError(
            "the number of steps is out of range",
            where="num_inference_steps",
            got=repr(steps),
            expected=f"an integer from 1 to {most}",
            remedy="20 steps are enough for the embedded models",
        )


def check_generator(generator: Generators, images: int) -> None:
    """Raise ``ConfigError`` where a list of generators is not one per image."""
    if isinstance(generator, list) and len(generator) != images:
        raise ConfigError(
            "the list of generators does not match the batch",
            where="generator",
            got=f"{len(generator)} generators",
            expected=f"{images}, one per image",
            remedy="pass one generator per image, or a single one",
        )


def check_output_type(output_type: str) -> None:
    """Raise ``ConfigError`` unless the output type is known."""
    if output_type not in get_args(OutputType):
        raise ConfigError(
            "the output type is unknown",
            where="output_type",
            got=repr(output_type),
            expected=", ".join(get_args(OutputType)),
            remedy="choose one of those",
        )


def is_integer(value: object) -> bool:
    """Return whether ``value`` is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def silent_loading() -> Generator[None]:
    """Keep diffusers' progress bar for loading off the terminal."""
    enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            diffusers_logging.enable_progress_bar()


def load_saved(kind: type[Loaded], folder: Path, name: str, remedy: str) -> Loaded:
    """Load the pipeline saved in ``folder`` with its weights widened to fp32.

    Raises:
        ConfigError: ``folder`` holds no pipeline; ``name`` says which, ``remedy`` what to do.
    """
    index = kind.config_name
    if not (folder / index).is_file():
        raise ConfigError(
            f"there is no {name} pipeline here",
            where=str(folder),
            expected=f"a folder with {index}",
            remedy=remedy,
        )
    with silent_loading():
        # Weights load as fp32 by default; the option's name differs between versions of diffusers.
        # Without the accelerate package, diffusers would warn about its low-memory loading.
        return kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)


def as_output(images: Tensor, output_type: OutputType) -> Any:
    """Return ``images`` ``[B, C, H, W]`` in [0, 1] as they are, as an array, or as PIL's."""
    if output_type == "pt":
        return images
    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return pixels
    to_pil: Any = DiffusionPipeline.numpy_to_pil  # diffusers has no annotation
    return to_pil(pixels)
