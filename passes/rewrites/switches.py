"""Decide what runs where passes are switched off, to bisect: which passes, and what of a plan.

A plan is reduced before it is unrolled. So no step writes a cache that no pass would read, or waits
for one that no pass would write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ditfastattn.core.env import DISABLE
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.strategies import Strategy, computing
from ditfastattn.passes.rewrites.base import Pass

_WINDOWS, _REUSE, _GUIDANCE = "window-residual", "reuse-outputs", "share-guidance"
_FIT = "fit-outputs"


def _passes_of(strategy: Strategy, two_calls: bool) -> set[str]:
    """Return the passes that carry out ``strategy``."""
    found = {_WINDOWS} if strategy.windowed else set()
    if strategy.fitted:
        return {_FIT}
    found |= {_GUIDANCE} if strategy.shares_guidance else set()
    # The second of two calls reads the output of the first.
    reuses = not strategy.computes or (two_calls and strategy.shares_guidance)
    return found | ({_REUSE} if reuses else set())


def _left_of(strategy: Strategy) -> tuple[Strategy, ...]:
    """Return what may be left of ``strategy`` without some of its passes, the most first."""
    if not (strategy.windowed and strategy.shares_guidance):
        return (strategy, Strategy.FULL)
    window = computing(windowed=True, shares_guidance=False)
    guidance = computing(windowed=False, shares_guidance=True)
    return (strategy, window, guidance, Strategy.FULL)


@dataclass(frozen=True)
class Switches:
    """Hold the passes that are off, each with the reason."""

    off: Mapping[str, str] = field(default_factory=dict)

    def strategy(self, wanted: Strategy, two_calls: bool) -> Strategy:
        """Return what is left of ``wanted``, for guidance by one or two calls a step."""
        options = _left_of(wanted)
        return next(
            each for each in options if self.off.keys().isdisjoint(_passes_of(each, two_calls))
        )

    def plan(
        self, rows: Sequence[Sequence[Strategy]], two_calls: bool
    ) -> Sequence[Sequence[Strategy]]:
        """Return what is left of the strategies ``rows[step][site]``."""
        if not self.off:
            return rows
        return [tuple(self.strategy(wanted, two_calls) for wanted in row) for row in rows]

    def sites(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Return ``sites``, with caches in the model's dtype where no pass narrows them."""
        if "narrow-caches" not in self.off:
            return sites
        return [site.with_caches_in(None) for site in sites]


def switched_off(passes: Sequence[Pass], disabled: Collection[str]) -> Switches:
    """Return the passes that are ``disabled``, and those that require one which is off.

    Raises:
        ConfigError: no pass has a name in ``disabled``.
    """
    names = [step.name for step in passes]
    unknown = sorted(set(disabled) - set(names))
    if unknown:
        raise ConfigError(
            "unknown pass", where=DISABLE, got=", ".join(unknown), expected=", ".join(names)
        )
    off: dict[str, str] = {}
    for step in passes:
        missing = [name for name in step.requires if name in off]
        if step.name in disabled:
            off[step.name] = f"named in {DISABLE}"
        elif missing:
            off[step.name] = f"it requires {', '.join(missing)}, which is off"
    return Switches(off)
