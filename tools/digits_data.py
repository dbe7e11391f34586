"""scikit-learn's bundled digits as images, and a classifier to judge generated ones."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

NUM_CLASSES = 10
_SOURCE_SIZE = 8
_SOURCE_MAX = 16.0


def digit_images(size: int) -> tuple[Tensor, Tensor]:
    """Return the 1797 real digits as ``[1797, 1, size, size]`` fp32 in [-1, 1], and their labels.

    The 8x8 originals (UCI Optical Recognition of Handwritten Digits, bundled with scikit-learn)
    are upscaled bicubically.
    """
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _SOURCE_MAX
    images = functional.interpolate(pixels, size=(size, size), mode="bicubic").clamp(0.0, 1.0)
    return images * 2.0 - 1.0, torch.tensor(digits.target, dtype=torch.long)


@lru_cache(maxsize=1)
def digit_classifier() -> SVC:
    """Fit an RBF support vector machine on the real 8x8 digits (0.99 accurate on held-out ones)."""
    digits = load_digits()
    return SVC(gamma=0.001, C=10.0).fit(digits.data, digits.target)


def classify(images: Tensor) -> np.ndarray:
    """Return the digit, 0 to 9, that each of ``images`` (``[B, 1, H, W]`` in [-1, 1]) shows."""
    small = functional.interpolate(images.float().cpu(), size=(_SOURCE_SIZE,) * 2, mode="area")
    pixels = (small.clamp(-1.0, 1.0) + 1.0) / 2.0 * _SOURCE_MAX
    predicted: np.ndarray = digit_classifier().predict(pixels.flatten(1).numpy())
    return predicted


def class_accuracy(images: Tensor, labels: Tensor) -> float:
    """Return the fraction of ``images`` that the classifier assigns to their label."""
    return float(np.mean(classify(images) == labels.cpu().numpy()))
