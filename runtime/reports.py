"""Report what a plan does to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ditfastattn.passes.analysis.flops import Flops
from ditfastattn.passes.analysis.sites import SiteReport
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import every_strategy


@dataclass(frozen=True)
class RunReport:
    """Report what a plan does to a model at one set of shapes.

    ``planned`` covers one generation, hoisted values included; it is None until every variant of
    the plan has been compiled, which the first generation does. ``ahead_bytes`` is the memory of
    the hoisted values that are kept: those of the generation, and those of each of its timesteps.
    """

    plan: Plan
    sites: SiteReport
    variants: int
    peak_cache_bytes: int
    ahead_bytes: int
    dense: Flops
    planned: Flops | None


def summary(plan: Plan) -> str:
    """Count the strategies of ``plan`` in one line."""
    counts = Counter(strategy for row in plan.strategies for strategy in row)
    parts = [f"{counts[strategy]} {strategy}" for strategy in every_strategy() if counts[strategy]]
    return f"{plan.sampler.steps} steps x {len(plan.sites)} sites: {', '.join(parts)}"
