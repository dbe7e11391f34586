"""Compare planned images with dense ones by several metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.judge.metrics import (
    SSIM_WINDOW,
    Psnr,
    QualityMetric,
    Ssim,
    measured,
)
from ditfastattn.runtime.search.judge.targets import Target


@dataclass(frozen=True)
class Quality:
    """Hold the values of one metric, one per planned image."""

    name: str
    label: str
    unit: str
    at_least: bool
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over all images."""
        return sum(self.values) / len(self.values)

    @property
    def worst(self) -> float:
        """Return the value that is furthest on the bad side."""
        return min(self.values) if self.at_least else max(self.values)


def compare(
    target: Target | None,
    prompts: Sequence[Prompt],
    reference: Sequence[Tensor],
    planned: Sequence[Tensor],
) -> tuple[Quality, ...]:
    """Compare ``planned`` with ``reference``, both lists ``[B, C, H, W]`` by prompt.

    The target's metric comes first, where it has one; then SSIM, where the images are large
    enough, and PSNR.

    Raises:
        ConfigError: the images cannot be compared, or the metric fails.
    """
    wanted: dict[str, tuple[QualityMetric, bool]] = {}
    if target is not None and target.metric is not None:
        wanted[target.name] = (target.metric, target.at_least)
    if min(reference[0].shape[-2:]) >= SSIM_WINDOW:
        wanted.setdefault("ssim", (Ssim(), True))
    wanted.setdefault("psnr", (Psnr(), True))
    return tuple(
        Quality(
            metric.name,
            metric.label,
            metric.unit,
            at_least,
            tuple(
                value
                for prompt, one, other in zip(prompts, reference, planned, strict=True)
                for value in measured(metric, one, other, prompt.call)
            ),
        )
        for metric, at_least in wanted.values()
    )
