"""Estimate the local error of every strategy with every cache, from sketches of dense generations.

What a shortcut changes at a site follows from a few tensors: the attention's output ``o[t]`` and
its residual ``r[t]`` (full minus window) at each step, per guidance branch. With a cache of step
``s``:

==================  ==============================================================
share-step          ``o[t] - o[s]``
window              ``r[t] - r[s]``
share-cfg           ``d[t]`` at the copied half, where ``d = o_cond - o_uncond``
window+share-cfg    ``r_c[t] - r_c[s]``, and ``d[t] - (r_c[t] - r_c[s])`` at the copied half
share-cfg+refresh   that of share-cfg; then a window's is ``r_u[t] - r_c[s]`` at the other half
extrapolate         ``o[t] - o[s] - (t - s) / g * (o[s] - o[s - g])``, with gap ``g``
quadratic           ``o[t]`` minus the parabola through ``o[s]``, ``o[s - g]``, ``o[s - g - h]``
==================  ==============================================================

So a sample of their elements, the same ones at every step, gives the error for *every* pair of
steps at once. (The progressive pass of DiTFastAttnV2 knows only the cache it happens to have.) An
error is the root of its energy relative to the output's own; DiTFastAttnV2, section 3.3, takes the
energies. Amplitudes are what adds up: most shortcuts change the image in the same direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import legal_strategies
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.search.measure.profile import Sketch

Array = NDArray[np.float64]
MAX_GAP = 6  # steps between the two outputs of an extrapolation


@dataclass(frozen=True)
class ErrorTable:
    """Hold relative errors by strategy, infinite where it is not legal; ``FULL`` has none.

    At step ``t`` and site ``m``: of what computes ``[T, M]``; of what reads a residual
    ``[T, 2 T, M]``, by the step ``s < t`` that stored it, or by ``T + s`` where that is a step that
    shares guidance, and the conditional half's residual serves both; of what reads outputs
    ``[T, T, G, M]``, by the step ``s < t`` of the last one and the gaps before it,
    ``gap_choices(outputs_read)``.
    """

    by_strategy: Mapping[Strategy, Array]

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(next(iter(self.by_strategy.values())))

    @property
    def sites(self) -> int:
        """Return the number of sites."""
        return int(next(iter(self.by_strategy.values())).shape[-1])

    def of(
        self,
        strategy: Strategy,
        step: int,
        source: int,
        site: int,
        gaps: tuple[int, ...] = (0,),
    ) -> float:
        """Return the error of ``strategy`` at ``step`` with the cache of step ``source``.

        ``gaps`` are the numbers of steps between the outputs computed last, the latest first.
        """
        if strategy == Strategy.FULL:
            return 0.0
        table = self.by_strategy[strategy]
        if strategy.outputs_read:
            place = gap_position(strategy.outputs_read, gaps)
            return math.inf if place is None else float(table[step, source, place, site])
        if strategy.windowed:
            return float(table[step, source, site])
        return float(table[step, site])

    def apply(self, change: Callable[[Strategy, Array], Array]) -> ErrorTable:
        """Return the table with what ``change`` makes of each strategy's errors."""
        return ErrorTable({each: change(each, item) for each, item in self.by_strategy.items()})


@cache
def gap_choices(outputs: int) -> tuple[tuple[int, ...], ...]:
    """Return the gaps between ``outputs`` earlier outputs for which errors are known.

    Between two of them 0 stands for a gap that is too wide.
    """
    if outputs == 1:
        return ((),)
    if outputs == 2:
        return tuple((gap,) for gap in range(MAX_GAP + 1))
    return tuple((gap,) * (outputs - 1) for gap in range(1, MAX_GAP + 1))


def gap_position(outputs: int, gaps: Sequence[int]) -> int | None:
    """Return where in ``gap_choices`` the latest of ``gaps`` are, or None where they are not."""
    latest = tuple(gaps[: outputs - 1])
    if outputs == 2 and latest[0] > MAX_GAP:
        return 0
    choices = gap_choices(outputs)
    return choices.index(latest) if latest in choices else None


def error_table(
    sketches: Sequence[Sketch],
    sites: Sequence[Site],
    layout: CfgLayout,
    form: int = 0,
) -> ErrorTable:
    """Return the errors; their energies are averaged over the prompts' sketches.

    ``form`` selects one of each site's windows; the first one where a site lacks it.
    """
    columns: dict[Strategy, list[Array]] = {}
    for index, site in enumerate(sites):
        own = form if form < len(site.windows) else 0
        found = [_energies(sketch, index, own) for sketch in sketches]
        legal = legal_strategies(site, layout)
        for strategy in found[0]:
            error = np.sqrt(np.mean([each[strategy] for each in found], axis=0))
            error = error if strategy in legal else np.full_like(error, np.inf)
            columns.setdefault(strategy, []).append(error)
    tables = {strategy: np.stack(column, axis=-1) for strategy, column in columns.items()}
    steps = len(sketches[0].outputs)
    future = np.triu(np.ones((steps, steps), dtype=bool))  # a cache is of an earlier step
    for strategy, table in tables.items():
        if strategy.outputs_read:
            table[future] = np.inf
        elif strategy.windowed:
            table[np.tile(future, 2)] = np.inf
    return ErrorTable(tables)


def _energies(sketch: Sketch, site: int, form: int) -> dict[Strategy, Array]:
    """Return the squared relative errors of every shortcut at one site, as in ``ErrorTable``."""
    outputs = sketch.outputs[:, site].double().numpy()
    residuals = sketch.residuals[:, site, form].double().numpy()
    energy = np.maximum((outputs**2).sum((1, 2)), np.finfo(np.float64).tiny)
    steps = len(outputs)
    flat = outputs.reshape(steps, -1)
    found: dict[Strategy, Array] = {}
    for strategy in strategies():
        if strategy.outputs_read:
            missed = _missed(flat, strategy, gap_choices(strategy.outputs_read))
            found[strategy] = missed / energy[:, None, None]
        elif strategy.windowed and not strategy.shares_guidance:
            own = _distances(residuals.reshape(steps, -1))
            crossed = sum(_distances(each, residuals[:, 0]) for each in residuals.swapaxes(0, 1))
            found[strategy] = np.concatenate([own, crossed], axis=1) / energy[:, None]
        elif strategy.shares_guidance:
            found[strategy] = _shared_energies(outputs, residuals, strategy.windowed, energy)
    return found


def _shared_energies(outputs: Array, residuals: Array, windowed: bool, energy: Array) -> Array:
    """Return the errors where the conditional branch serves both: ``[T]``, windowed ``[T, 2 T]``.

    The branches are the second dimension of ``outputs`` and ``residuals``.
    """
    steps = len(outputs)
    if outputs.shape[1] == 1:
        return np.full((steps, 2 * steps) if windowed else steps, np.inf)
    between = outputs[:, 0] - outputs[:, 1]
    gap = (between**2).sum(1)
    if not windowed:
        alone: Array = gap / energy
        return alone
    conditional = residuals[:, 0]
    drift = _distances(conditional)  # |r_c[t] - r_c[s]|^2, whichever step stored it
    along = (conditional * between).sum(1)[:, None] - between @ conditional.T
    both = (2.0 * drift + gap[:, None] - 2.0 * along) / energy[:, None]
    clipped: Array = np.tile(np.maximum(both, 0.0), 2)
    return clipped


def _missed(rows: Array, strategy: Strategy, choices: Sequence[tuple[int, ...]]) -> Array:
    """Return squared distances of each row from what ``strategy`` makes of earlier ones.

    ``[T, n] -> [T, T, G]``: the energy of ``o[t]`` minus the weighted sum of ``o[s]`` and of those
    before it, by the gaps of ``choices`` between them; infinite where there are none.
    """
    steps = len(rows)
    products = rows @ rows.T
    own = np.diag(products)[:, None]
    found = np.full((steps, steps, len(choices)), np.inf)
    for index, gaps in enumerate(choices):
        if 0 in gaps or sum(gaps) >= steps:
            continue
        weights = _weights(strategy, steps, gaps)
        sources = [np.arange(sum(gaps), steps) - ago for ago in accumulate((0, *gaps))]
        total = np.repeat(own, len(sources[0]), axis=1)
        for weight, source in zip(weights, sources, strict=True):
            total -= 2.0 * weight * products[:, source]
            for other, another in zip(weights, sources, strict=True):
                total += weight * other * products[source, another]
        found[:, sum(gaps) :, index] = total
    return found.clip(min=0.0)


@cache
def _weights(strategy: Strategy, steps: int, gaps: tuple[int, ...]) -> Array:
    """Return the weights of ``o[s]``, ``o[s - g]`` and so on at each step: ``[1 + gaps, T, S]``."""
    last = range(sum(gaps), steps)
    weights = [[strategy.weights(step - source, gaps) for source in last] for step in range(steps)]
    return np.moveaxis(np.array(weights), -1, 0)


def _distances(rows: Array, others: Array | None = None) -> Array:
    """Return squared distances of ``rows`` from ``others``, or from each other: ``[T, T]``."""
    others = rows if others is None else others
    squared, other = (rows**2).sum(1), (others**2).sum(1)
    distances: Array = squared[:, None] + other[None, :] - 2.0 * rows @ others.T
    return distances.clip(min=0.0)
