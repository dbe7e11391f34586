"""Report what a plan does to a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ditfastattn.core.html import facts_table
from ditfastattn.passes.analysis.flops import Flops
from ditfastattn.passes.analysis.sites import SiteReport
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import CacheSlot
from ditfastattn.passes.plan.strategies import every_strategy
from ditfastattn.runtime.unrolled import UnrolledPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReport:
    """Report what a plan does to a model at one set of shapes.

    ``caches`` are the cache slots of all calls of a step, with the steps at which they are held.
    ``planned`` covers one generation, hoisted values included; it is None until every variant of
    the plan has been compiled, which the first generation does. ``ahead_bytes`` is the memory of
    the hoisted values, which are kept for a generation.
    """

    plan: Plan
    sites: SiteReport
    variants: int
    peak_cache_bytes: int
    ahead_bytes: int
    dense: Flops
    planned: Flops | None
    caches: tuple[CacheSlot, ...] = ()

    @property
    def attention_kept(self) -> float | None:
        """Return the fraction of the attention FLOPs that the plan keeps, once it is known."""
        return None if self.planned is None else self.planned.attention / self.dense.attention

    @property
    def matrix_kept(self) -> float | None:
        """Return the fraction of all matrix-product FLOPs that the plan keeps, once it is known."""
        return None if self.planned is None else self.planned.total / self.dense.total

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it, above its plan."""
        rows = [
            ("sites", f"{len(self.sites.sites)}, {len(self.sites.declined)} attentions declined"),
            ("step variants", str(self.variants)),
            ("peak cache", f"{self.peak_cache_bytes / 2**20:.1f} MiB"),
            ("hoisted values", f"{self.ahead_bytes / 2**20:.1f} MiB"),
        ]
        if self.matrix_kept is not None:
            rows.append(("matrix FLOPs kept", f"{self.matrix_kept:.0%}"))
        return facts_table(rows) + self.plan._repr_html_()


def summary(plan: Plan) -> str:
    """Count the strategies of ``plan`` in one line."""
    counts = Counter(strategy for row in plan.strategies for strategy in row)
    parts = [f"{counts[strategy]} {strategy}" for strategy in every_strategy() if counts[strategy]]
    return f"{plan.sampler.steps} steps x {len(plan.sites)} sites: {', '.join(parts)}"


def run_report(
    unrolled: UnrolledPlan,
    sites: SiteReport,
    *,
    dense: Flops,
    hoisted: Flops,
    hoisted_bytes: int,
    calls: Sequence[Flops],
) -> RunReport:
    """Return what a plan in force does to a model whose sites are ``sites``.

    ``dense`` is the work of one dense call, ``hoisted`` what a guidance branch computes once;
    ``calls`` holds the work of each call of a generation whose variant has been compiled.
    """
    plan, programs = unrolled.plan, unrolled.programs
    count = sum(len(program.schedule) for program in programs)
    once = hoisted.times(len(programs))
    return RunReport(
        plan=plan,
        sites=sites,
        variants=len({row for program in programs for row in program.variants}),
        peak_cache_bytes=unrolled.peak_cache_bytes,
        ahead_bytes=hoisted_bytes,
        dense=dense.times(count),
        planned=sum(calls, once) if len(calls) == count else None,
        caches=tuple(each for program in programs for each in program.slots.slots),
    )


def log_plan(unrolled: UnrolledPlan, hoisted_bytes: int) -> None:
    """Log what a plan comes to, unrolled; warn where it changes nothing."""
    log.info(
        "unroll: %d steps, %d variants, %d cache slots, at most %.1f MiB of caches, "
        "%.1f MiB of hoisted values",
        unrolled.plan.sampler.steps,
        sum(len(program.variants) for program in unrolled.programs),
        sum(len(program.slots.slots) for program in unrolled.programs),
        unrolled.peak_cache_bytes / 2**20,
        hoisted_bytes / 2**20,
    )
    log.info("plan: %s", summary(unrolled.plan))
    if unrolled.plan.changed == 0:
        log.warning("ditfastattn: the plan changes nothing: every step runs full attention")
