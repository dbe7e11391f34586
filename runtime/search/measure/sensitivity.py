"""Measure how much an error at a site and step changes the final image.

Two measurements at a few probe steps, in the target's own terms:

- *at the model*: share one site's last output, let everything else run, and compare the model's
  output (guidance applied): this distinguishes sites;
- *at the image*: share all sites at that step alone, finish the generation dense, and measure the
  damage to the image: this distinguishes steps.

The weight of a site at a step is the root of the damage per relative error. Between probe steps it
is interpolated in the logarithm, over the logarithm of the distance to the end: the last steps
matter far more than the middle ones, so the probes are at distances 1, 3, 9, 27, ... and at step
1. What precedes a probe is dense and known, so it is replayed, not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure.error_table import ErrorTable
from ditfastattn.runtime.search.measure.session import Session

Array = NDArray[np.float64]
_RATIO = 3
_FLOOR = 1e-12  # damage and errors below this are noise


def probe_steps(steps: int) -> tuple[int, ...]:
    """Return the steps to probe, ascending."""
    distances = {steps - 1}
    distance = 1
    while distance < steps - 1:
        distances.add(distance)
        distance *= _RATIO
    return tuple(sorted(steps - distance for distance in distances if 0 < distance < steps))


def probe_rows(session: Session, steps: int, step: int) -> list[tuple[Strategy, ...]]:
    """Return the plan that shares every site that can be shared, at ``step`` alone."""
    full = (Strategy.FULL,) * len(session.sites)
    shared = tuple(
        Strategy.FULL if why_not(Strategy.SHARE_STEP, site, session.layout) else Strategy.SHARE_STEP
        for site in session.sites
    )
    return [shared if at == step else full for at in range(steps)]


def site_weights(
    table: ErrorTable, effects: Mapping[int, Sequence[float]], damages: Mapping[int, float]
) -> Array:
    """Return the root of the damage to the image per relative error, ``[T, M]``.

    ``effects[step][site]`` is a site's effect on the model's output, ``damages[step]`` that of all
    sites on the image, when the last step's outputs are shared at that step alone.
    """
    steps = sorted(damages)
    rows = []
    for step in steps:
        errors = table.by_strategy[Strategy.SHARE_STEP][step, step - 1, 0]
        shared = np.isfinite(errors)
        at_model = np.maximum(effects[step], _FLOOR)
        relative = np.where(shared, at_model / np.maximum(errors**2, _FLOOR), at_model.mean())
        damage = max(damages[step], _FLOOR)
        rows.append(np.sqrt(relative * damage / max(float(at_model[shared].sum()), _FLOOR)))
    return _interpolated(steps, np.stack(rows), table.steps)


def _interpolated(steps: Sequence[int], rows: Array, count: int) -> Array:
    """Fill in the steps between probes; before the first probe its value holds."""
    known = -np.log([count - step for step in steps])
    wanted = -np.log([count - step for step in range(count)])
    columns = [np.exp(np.interp(wanted, known, np.log(column))) for column in rows.T]
    return np.stack(columns, axis=-1)
