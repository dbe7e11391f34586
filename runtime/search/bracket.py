"""Close in on the strength at which something that grows with it reaches its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

AIM = 0.9
LARGEST_MOVE = 16.0
_NARROW = 1.1  # no round is worth it within a bracket this narrow


@dataclass
class Bracket:
    """Close in on the strength at which a ratio, growing with it, reaches 1."""

    strength: float
    order: float = 1.0  # the ratio grows roughly with this power of the strength
    low: float = 0.0  # the strongest that met the goal
    high: float = math.inf  # the weakest that missed it

    def record(self, met: bool) -> None:
        """Record whether the current strength met the goal."""
        if met:
            self.low = max(self.low, self.strength)
        else:
            self.high = min(self.high, self.strength)

    def move(self, ratio: float) -> None:
        """Choose the next strength, where the ratio of actual to wanted was ``ratio``."""
        self.strength = self.after(ratio)

    def after(self, ratio: float) -> float:
        """Return the strength that ``move`` would choose."""
        if self.closed:
            return self.low  # the only one left
        factor: float = (AIM / max(ratio, 1e-12)) ** (1.0 / self.order)
        aimed = self.strength * min(LARGEST_MOVE, max(1.0 / LARGEST_MOVE, factor))
        if self.low and math.isfinite(self.high):
            inside = self.low * 1.05 < aimed < self.high / 1.05
            aimed = aimed if inside else math.sqrt(self.low * self.high)
        return aimed

    @property
    def closed(self) -> bool:
        """Return whether the bracket is too narrow for another round."""
        return bool(self.low) and self.high / self.low < _NARROW

    def closing(self, met: bool) -> bool:
        """Return whether the outcome ``met`` at the current strength would close the bracket."""
        return met and self.high / self.strength < _NARROW
