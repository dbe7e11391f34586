"""The nodes of the paths that ``paths.py`` finds: what a site has computed last, and when."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.measure.error_table import MAX_GAP, ErrorTable, gap_choices

FULL = 0  # the first kind of ``_kinds``
LINE, PARABOLA = 2, 3  # outputs read


@dataclass(frozen=True)
class Kind:
    """Say what a step computes, and whether a residual has been stored (and paid for) by then."""

    strategy: Strategy
    stored: bool


def _kinds() -> tuple[Kind, ...]:
    """Return what a step can compute: ``FULL``, then kinds without and with a stored residual."""
    shortcuts = [s for s in strategies() if s.computes and not s.refreshes_residual]
    plain = [strategy for strategy in shortcuts if not strategy.windowed]
    windowed = [strategy for strategy in shortcuts if strategy.windowed]
    return (
        Kind(Strategy.FULL, False),
        *(Kind(strategy, False) for strategy in plain),
        *(Kind(strategy, True) for strategy in (*plain, *windowed)),
    )


def reusing() -> tuple[Strategy, ...]:
    """Return the strategies that reuse outputs; those of more than three are not considered."""
    return tuple(s for s in strategies() if 0 < s.outputs_read <= PARABOLA)


@dataclass(frozen=True)
class PathNodes:
    """Number the nodes of sites of which all or none have windows.

    A node is (step that computes, step of the residual, gaps, what it computes); where there are no
    windows the second is always 0. The gaps are those before the step: one, as a line needs it, 0
    where it is too wide; or two, as a parabola needs it. Before a node of one gap there may be any.

    Attributes:
        steps: how many there are.
        windowed: whether the sites have windows.
        kinds: what a step can compute.
        lines: how many gaps come first that a line needs.
        pairs: the places in ``gap_choices`` of those that a parabola needs.
    """

    steps: int
    windowed: bool
    kinds: tuple[Kind, ...]
    lines: int
    pairs: tuple[int, ...]

    @cached_property
    def gaps(self) -> tuple[tuple[int, ...], ...]:
        """Return the gaps that a node may have: ``lines`` of one, then those of ``pairs``."""
        singles = tuple((gap,) for gap in range(self.lines))
        return (*singles, *(gap_choices(PARABOLA)[pair] for pair in self.pairs))

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Return how many steps, residuals, gaps and kinds there are: ``[T, R, G, K]``."""
        return (self.steps, self.steps if self.windowed else 1, len(self.gaps), len(self.kinds))

    @cached_property
    def unstored(self) -> slice:
        """Return the kinds before which no residual has been stored."""
        return slice(0, sum(not kind.stored for kind in self.kinds))

    @cached_property
    def stored(self) -> slice:
        """Return the kinds by which a residual has been stored."""
        return slice(self.unstored.stop, None)

    def residuals(self, step: int) -> slice:
        """Return those residuals that nodes before ``step`` can have."""
        return slice(0, step if self.windowed else 1)

    def before(self, step: int, gaps: tuple[int, ...]) -> tuple[slice, list[int]]:
        """Return the steps, and the places of their gaps, from which ``gaps`` lead to ``step``."""
        gap, *earlier = gaps
        steps = slice(step - gap, step - gap + 1) if gap else slice(0, step - self.lines + 1)
        held = [i for i, each in enumerate(self.gaps) if not earlier or each[0] == earlier[0]]
        return steps, held


def nodes_of(errors: ErrorTable, windowed: bool) -> PathNodes:
    """Return the nodes of the sites of ``errors``, with the gaps that some of them may take."""
    steps = errors.steps
    tables = [errors.by_strategy[s] for s in reusing() if s.outputs_read == PARABOLA]
    pairs = tuple(
        index
        for index, pair in enumerate(gap_choices(PARABOLA))
        if sum(pair) < steps and any(np.isfinite(table[:, :, index]).any() for table in tables)
    )
    return PathNodes(steps, windowed, _kinds(), min(MAX_GAP, max(1, steps - 1)) + 1, pairs)
