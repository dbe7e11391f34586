"""The plans that a search tries: one per strength, each made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditfastattn.runtime.search.methods import Chooser
from ditfastattn.runtime.search.solve.rows import Row


@dataclass(frozen=True)
class Found:
    """Hold a plan's rows and what was measured of them."""

    rows: list[Row]
    strength: float
    calibrated: Sequence[float] = ()
    held_out: Sequence[float] = ()
    rounds: int = 0


class Candidates:
    """Make the plan of each strength once, and predict its speedup."""

    def __init__(self, chooser: Chooser, merge_variants: bool) -> None:
        """Take what chooses strategies."""
        self.chooser = chooser
        self._merge_variants = merge_variants
        self._made: dict[float, list[Row]] = {}

    @property
    def first(self) -> float:
        """Return the strength to begin with."""
        return self.chooser.first

    @property
    def tries(self) -> int:
        """Return how many plans may be made in looking for one."""
        return self.chooser.tries

    def rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength."""
        if strength not in self._made:
            self._made[strength] = self.chooser.rows(strength)
        return self._made[strength]

    def speedup(self, rows: Sequence[Row]) -> float:
        """Return the predicted speedup of a plan."""
        return self.chooser.costs.speedup(rows, self._merge_variants)

    def is_strongest(self, rows: Sequence[Row]) -> bool:
        """Return whether every step but the first takes the cheapest strategy at every site."""
        costs = self.chooser.costs
        cheapest = [min(prices.values()) for prices in costs.sites]
        return all(
            costs.sites[index][strategy] <= cheapest[index]
            for row in rows[1:]
            for index, strategy in enumerate(row)
        )
