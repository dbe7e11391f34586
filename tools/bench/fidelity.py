"""Compare a contender's images with the dense model's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim

MOST_PSNR = 99.0  # dB, for equal images: JSON has no infinity


@dataclass(frozen=True)
class Fidelity:
    """How close images are to dense ones of the same seeds; PSNR in dB, at most ``MOST_PSNR``.

    ``ssims`` and ``psnrs`` hold a value per image; the others are their means, the standard errors
    of these, and the worst image's.
    """

    ssim: float
    ssim_standard_error: float
    worst_ssim: float
    psnr: float
    psnr_standard_error: float
    worst_psnr: float
    ssims: tuple[float, ...]
    psnrs: tuple[float, ...]


def fidelity(dense: Tensor, images: Tensor) -> Fidelity:
    """Compare ``images`` with ``dense``, both ``[B, C, H, W]`` in [0, 1]."""
    ssims: list[float] = image_ssim(dense, images).tolist()
    psnrs = [min(value, MOST_PSNR) for value in image_psnr(dense, images).tolist()]
    return Fidelity(*summary(ssims), *summary(psnrs), tuple(ssims), tuple(psnrs))


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, its standard error, and the least of ``values``."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, error, min(values)
