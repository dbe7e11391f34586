"""Decide what runs where passes are switched off, to bisect: which passes, and what of a plan.

A plan is reduced before it is unrolled. So no step writes a cache that no pass would read, or waits
for one that no pass would write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ditfastattn.core.env import DISABLE
from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.sites import Site
from ditfastattn.passes.plan.schema import Strategy
from ditfastattn.passes.rewrites.base import Pass

# The passes that carry out a strategy, and what is left of it without some of them.
_PASSES: dict[Strategy, tuple[str, ...]] = {
    Strategy.FULL: (),
    Strategy.WINDOW: ("window-residual",),
    Strategy.SHARE_STEP: ("share-across-steps",),
    Strategy.SHARE_CFG: ("share-across-cfg",),
    Strategy.WINDOW_SHARE_CFG: ("window-residual", "share-across-cfg"),
    Strategy.EXTRAPOLATE: ("extrapolate-steps",),
    Strategy.EXTRAPOLATE_QUADRATIC: ("extrapolate-steps",),
}
_PARTS: dict[Strategy, tuple[Strategy, ...]] = {
    Strategy.WINDOW_SHARE_CFG: (Strategy.WINDOW, Strategy.SHARE_CFG),
}
_BETWEEN_CALLS = "share-across-steps"  # the second call of a step reads the output of the first


@dataclass(frozen=True)
class Switches:
    """Hold the passes that are off, each with the reason."""

    off: Mapping[str, str] = field(default_factory=dict)

    def strategy(self, wanted: Strategy, two_calls: bool) -> Strategy:
        """Return what is left of ``wanted``, for guidance by one or two calls a step."""
        options = (wanted, *_PARTS.get(wanted, ()), Strategy.FULL)
        return next(option for option in options if self._runs(option, two_calls))

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

    def _runs(self, strategy: Strategy, two_calls: bool) -> bool:
        between = (_BETWEEN_CALLS,) if two_calls and strategy.shares_cfg else ()
        return self.off.keys().isdisjoint((*_PASSES[strategy], *between))


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
