"""Follow the curve through earlier outputs: a line through two, a parabola through three."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def output_weights(elapsed: int, gaps: Sequence[int]) -> tuple[float, ...]:
    """Return Lagrange's weights of the last outputs, ``elapsed`` steps after the last one.

    ``gaps`` are the steps between them, those between the last two first: one gap for a line, two
    for a parabola.
    """
    steps = [0, *accumulate(-gap for gap in gaps)]
    return tuple(
        math.prod((elapsed - other) / (own - other) for other in steps if other != own)
        for own in steps
    )


def change_factors(elapsed: int, gaps: Sequence[int]) -> tuple[float, ...]:
    """Return the same curve as factors of the changes between outputs, added to the last one."""
    weights = output_weights(elapsed, gaps)
    return tuple(-sum(weights[index:]) for index in range(1, len(weights)))


def curve(points: Sequence[tuple[int, Any]], step: int) -> Any:
    """Return Lagrange's polynomial through ``points``, pairs of step and value, at ``step``."""
    total: Any = 0.0
    for own, value in points:
        others = [other for other, _ in points if other != own]
        total = total + math.prod((step - other) / (own - other) for other in others) * value
    return total
