"""Compare a contender's images with the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim

MOST_PSNR = 99.0  # dB, for equal images: JSON has no infinity


@dataclass(frozen=True)
class Fidelity:
    """How close images are to dense ones of the same seeds; PSNR in dB, at most ``MOST_PSNR``."""

    ssim: float
    worst_ssim: float
    psnr: float
    ssims: tuple[float, ...]
    psnrs: tuple[float, ...]


def fidelity(dense: Tensor, images: Tensor) -> Fidelity:
    """Compare ``images`` with ``dense``, both ``[B, C, H, W]`` in [0, 1]."""
    ssims: list[float] = image_ssim(dense, images).tolist()
    psnrs = [min(value, MOST_PSNR) for value in image_psnr(dense, images).tolist()]
    mean = sum(ssims) / len(ssims)
    return Fidelity(mean, min(ssims), sum(psnrs) / len(psnrs), tuple(ssims), tuple(psnrs))
