"""Name the methods that choose strategies, and define what each must provide."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.search.measure.latency import CostTable, Objective, measure_costs
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row


class Method(StrEnum):
    """Name how strategies are chosen."""

    AUTO = "auto"  # joint for a quality, greedy for a threshold, else global
    GLOBAL = "global"
    PER_STEP = "per-step"
    GREEDY = "greedy"
    WHOLE_STEPS = "whole-steps"  # which steps run at all
    JOINT = "joint"  # both: which steps run, and what sites do within them


class Chooser(Protocol):
    """Make plans of any strength; stronger is faster and worse."""

    @property
    def costs(self) -> CostTable:
        """Return the price of each strategy at each site."""
        ...

    @property
    def first(self) -> float:
        """Return the strength to begin with."""
        ...

    @property
    def order(self) -> float:
        """Return the power of the strength that damage is roughly proportional to."""
        ...

    @property
    def tries(self) -> int:
        """Return how many plans may be made in looking for one."""
        ...

    @property
    def predicts(self) -> bool:
        """Return whether plans are made without running the model."""
        ...

    def rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength."""
        ...


def measured_costs(work: Work, objective: Objective) -> tuple[CostTable, ...]:
    """Return the price of each strategy at each site, for each form of window."""
    work.begin("measuring the latency of each strategy")

    def make() -> list[dict[str, Any]]:
        found = measure_costs(work.variants, objective)
        work.spend(6.0 * len(strategies()))
        return [
            {
                "step": table.step,
                "sites": [{s.name: price for s, price in prices.items()} for prices in table.sites],
                "residual": table.residual,
            }
            for table in found
        ]

    return tuple(map(_read_costs, work.checkpoint.data("costs", make)))


def _read_costs(data: dict[str, Any]) -> CostTable:
    return CostTable(
        step=data["step"],
        # The checkpoint may be older than a strategy, and have no price for it.
        sites=tuple(
            {s: float(site.get(s.name, "inf")) for s in strategies()} for site in data["sites"]
        ),
        residual=tuple(data["residual"]),
    )
