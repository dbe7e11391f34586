"""Measure how close planned images are to dense ones; images are ``[B, C, H, W]`` in [0, 1]."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError

# What a user may pass: (dense, planned) -> one value per image, or one for all of them. A function
# with a parameter ``call`` also gets what the pipeline was called with.
Metric = Callable[..., Tensor | Sequence[float] | float]

SSIM_WINDOW = 11


def image_ssim(dense: Tensor, planned: Tensor) -> Tensor:
    """Return the structural similarity of each image, ``[B]``; 1 where the images are equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    require_side(dense, SSIM_WINDOW, "SSIM")
    similarity = structural_similarity_index_measure(
        planned.float(), dense.float(), data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    equal = (planned == dense).flatten(1).all(1)  # float error must not fail a bound of 1
    return similarity.masked_fill(equal, 1.0).clamp(max=1.0)


def image_psnr(dense: Tensor, planned: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, ``[B]``; inf where equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        planned.float(), dense.float(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


def image_mse(dense: Tensor, planned: Tensor) -> Tensor:
    """Return the mean squared error of each image, ``[B]``."""
    return (planned.float() - dense.float()).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class QualityMetric(ABC):
    """Describe a metric of images.

    Attributes:
        name: the metric's name in options and records.
        label: its name in sentences.
        unit: what follows a value, with its space.
        perfect: its value for equal images; None where that depends on the images.
    """

    name: str
    label: str
    unit: str = ""
    perfect: float | None = None

    def prepare(self, call: Mapping[str, Any]) -> None:  # noqa: B027  # most need nothing
        """Load what the metric needs, so that missing parts are reported before a generation."""

    @abstractmethod
    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Any:
        """Return one value per image, or one for all of them."""

    def damage(self, value: float, perfect: float) -> float:
        """Return how far ``value`` is from equal images."""
        return abs(perfect - value)


@dataclass(frozen=True, kw_only=True)
class Ssim(QualityMetric):
    """Compare structure: 1 is equal."""

    name: str = "ssim"
    label: str = "SSIM"
    perfect: float | None = 1.0

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the structural similarity, ``[B]``."""
        return image_ssim(dense, planned)


@dataclass(frozen=True, kw_only=True)
class Psnr(QualityMetric):
    """Compare pixels, in dB: inf is equal."""

    name: str = "psnr"
    label: str = "PSNR"
    unit: str = " dB"
    perfect: float | None = math.inf

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the peak signal-to-noise ratio, ``[B]``."""
        return image_psnr(dense, planned)

    def damage(self, value: float, perfect: float) -> float:
        """Return the mean squared error that ``value`` stands for."""
        return float(10.0 ** (-value / 10.0))


@dataclass(frozen=True, kw_only=True)
class UserMetric(QualityMetric):
    """Compare by a user's function; it gets ``call`` if it has a parameter of that name."""

    function: Metric = field(repr=False)

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Any:
        """Return what the function returns.

        Raises:
            ConfigError: the function raised.
        """
        asked = {"call": call} if _takes_call(self.function) else {}
        try:
            return self.function(dense, planned, **asked)
        except Exception as error:
            raise ConfigError(
                "the metric failed",
                where=f"metric {self.name!r}",
                got=f"{type(error).__name__}: {error}",
                expected="a value per image, from dense and planned images [B, C, H, W] in [0, 1]",
            ) from error


def _takes_call(function: Metric) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("call")
    except (TypeError, ValueError):  # some functions written in C have no signature
        return False
    return parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY


def measured(
    metric: QualityMetric,
    dense: Tensor,
    planned: Tensor,
    call: Mapping[str, Any],
    *,
    allow_nan: bool = False,
) -> list[float]:
    """Return the metric's value for each image; a single value stands for every image.

    Raises:
        ConfigError: the images cannot be compared, or the metric does not return numbers.
    """
    _check_images(dense, planned)
    with torch.no_grad():
        result = metric.measure(dense.float(), planned.float(), call)
    where, count = f"metric {metric.name!r}", len(dense)
    try:
        values: list[float] = torch.as_tensor(result).double().flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        values = []
    if len(values) not in (1, count):
        raise ConfigError(
            "the metric's result does not fit the images",
            where=where,
            got=f"shape {list(result.shape)}" if isinstance(result, Tensor) else repr(result),
            expected=f"{count} values, one per image, or a single one",
        )
    if not allow_nan and any(math.isnan(value) for value in values):
        raise ConfigError(
            "the metric is not a number for some images",
            where=where,
            got=values,
            expected="numbers; inf is allowed",
        )
    return values if len(values) == count else values * count


def perfect_values(
    metric: QualityMetric, dense: Tensor, call: Mapping[str, Any]
) -> list[float | None]:
    """Return the metric's value for images equal to ``dense``; None where it is not a finite one.

    Raises:
        ConfigError: as for ``measured``.
    """
    if metric.perfect is not None:
        return [metric.perfect] * len(dense)
    found = measured(metric, dense, dense, call, allow_nan=True)
    return [value if math.isfinite(value) else None for value in found]


def _check_images(dense: Tensor, planned: Tensor) -> None:
    if dense.shape != planned.shape or dense.ndim != 4 or not dense.numel():
        raise ConfigError(
            "dense and planned images do not match",
            where="images to compare",
            got=f"{list(dense.shape)} and {list(planned.shape)}",
            expected="[B, C, H, W] twice",
        )
    for which, images in (("dense", dense), ("planned", planned)):
        low, high = images.min().item(), images.max().item()
        if not (low >= 0.0 and high <= 1.0):  # a NaN fails as well
            raise ConfigError(
                "the images have values outside of their range",
                where=f"{which} images",
                got=f"{low:g} to {high:g}",
                expected="0 to 1, as a pipeline returns for output_type='pt'",
                remedy="for nan, run the pipeline in bfloat16 or float32",
            )


def require_side(images: Tensor, least: int, label: str) -> None:
    """Refuse images with a side below ``least`` pixels, which ``label`` cannot measure.

    Raises:
        ConfigError: the images are too small.
    """
    height, width = images.shape[-2:]
    if min(height, width) < least:
        raise ConfigError(
            f"the images are too small for {label}",
            where="images to compare",
            got=f"{height} x {width} pixels",
            expected=f"{least} or more on each side",
            remedy="generate larger images, or use PSNR (--min-psnr)",
        )


def as_rgb(images: Tensor, label: str) -> Tensor:
    """Return ``images`` with three channels; a single channel is repeated.

    Raises:
        ConfigError: the images are neither grey nor RGB.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ConfigError(
            f"{label} takes grey or RGB images",
            where="images to compare",
            got=f"{channels} channels",
            expected="1 or 3",
            remedy="use another metric (--min-ssim)",
        )
    return images.expand(-1, 3, -1, -1)
