"""Attribute the drift of planned images to the plan, and to compilation and precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.runtime.search.judge.metrics import image_mse


@dataclass(frozen=True)
class Drift:
    """Hold mean squared errors of images in [0, 1] to the dense eager ones, over all prompts.

    Attributes:
        plan: of the planned eager images: the plan alone.
        compilation: of the dense compiled images: other kernels and roundings alone; None where
            nothing was compiled.
        both: of the planned compiled images; None as above.
    """

    plan: float
    compilation: float | None = None
    both: float | None = None

    @property
    def plan_share(self) -> float | None:
        """Return the plan's part of the two errors taken alone; None if unknown."""
        if self.compilation is None or self.plan + self.compilation == 0.0:
            return None
        return self.plan / (self.plan + self.compilation)

    def describe(self) -> str:
        """Return a sentence: "99.9% of the drift comes from the plan, 0.1% from ..."."""
        if self.compilation is None:
            some = "this drift is the plan's alone" if self.plan else "no drift from the plan"
            return f"{some}; compilation was not measured"
        share = self.plan_share
        if share is None:
            return "no drift: neither the plan nor compilation changes an image"
        return (
            f"{_percent(share)} of the drift comes from the plan, "
            f"{_percent(1.0 - share)} from compilation and precision"
        )


def mean_squared_error(reference: Sequence[Tensor], images: Sequence[Tensor]) -> float:
    """Return the mean over every image of each prompt, both lists ``[B, C, H, W]`` by prompt."""
    errors = [
        error
        for one, other in zip(reference, images, strict=True)
        for error in image_mse(one, other).tolist()
    ]
    return math.fsum(errors) / len(errors)


def decibels(mse: float) -> float:
    """Return the peak signal-to-noise ratio that ``mse`` stands for, in dB."""
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def _percent(share: float) -> str:
    """Return a percentage that rounds neither to nothing nor to everything."""
    if 0.0 < share < 0.0005:
        return "less than 0.1%"
    if 0.9995 <= share < 1.0:
        return "more than 99.9%"
    return f"{share:.1%}"
