"""Choose, site by site, between a window of the sequence and one by tiles of the grid.

Both are measured: the residual's drift and the latency of each form are known before any plan is
made. At a rate of exchange between drift and price, a site's best schedule with either form follows
from the same shortest paths as the plan itself; the form whose schedules are better over a range of
rates is taken.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

import numpy as np

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.windows.window import TileWindow, Window
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.solve.paths import solve
from ditfastattn.runtime.search.solve.problem import Problem

log = logging.getLogger(__name__)
# Times the rate at which the dense price equals that of the drift expected.
_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)


class WindowForm(StrEnum):
    """Name the windows that a search may use."""

    AUTO = "auto"  # what is measured to be better, site by site
    BAND = "band"  # of the flattened sequence, as in the paper
    TILES = "tiles"  # of the token grid, or the sequence where no grid is known; or a band


def allowed_windows(sites: Sequence[Site], form: WindowForm, device: str) -> tuple[Site, ...]:
    """Return ``sites`` with the windows that ``form`` leaves, the first one chosen.

    ``device`` is the type of the device that runs them. It decides which of the two windows of a
    sequence is measured: tiles on a CPU, where kernels read slices and need no bias; the band on a
    GPU, where FlexAttention computes it.
    """
    return tuple(_allowed(site, form, device) for site in sites)


def _allowed(site: Site, form: WindowForm, device: str) -> Site:
    if not site.windows:
        return site
    band, *tiled = site.windows
    of_grid = [window for window in tiled if not _is_of_sequence(site, window)]
    of_sequence = [window for window in tiled if _is_of_sequence(site, window)]
    left = [band]
    if form is WindowForm.TILES:
        left = (of_grid or of_sequence or left)[:1]
    elif form is WindowForm.AUTO:
        left = [*(of_sequence if of_sequence and device == "cpu" else left), *of_grid]
    return replace(site, window=left[0], windows=tuple(left))


def _is_of_sequence(site: Site, window: Window) -> bool:
    return isinstance(window, TileWindow) and len(window.grid) == 1 != len(site.grid)


def choose_windows(problems: Sequence[Problem], drift: float) -> list[int]:
    """Return which of ``problems``, alike but for the form of windows, is best at each site.

    ``drift`` is about what a plan will have.
    """
    first = problems[0]
    natural = first.costs.step * first.errors.steps / drift
    sites = range(first.errors.sites)
    values = np.zeros((len(problems), len(sites)))
    for rate in _RATES:
        for form, problem in enumerate(problems):
            columns = list(zip(*solve(problem, natural * rate), strict=True))
            for site in sites:
                price = problem.costs.column(site, columns[site])
                drifted = problem.column_drift(site, columns[site])
                values[form, site] += price / rate + natural * drifted
    return [int(form) for form in values.argmin(axis=0)]


def with_chosen(problems: Sequence[Problem], chosen: Sequence[int]) -> Problem:
    """Return the problem that has each site's errors and prices from the form chosen for it."""
    tables = [problem.errors for problem in problems]
    errors = tables[0].apply(
        lambda strategy, _: np.stack(
            [tables[form].by_strategy[strategy][..., i] for i, form in enumerate(chosen)], axis=-1
        )
    )
    costs = CostTable(
        step=problems[0].costs.step,
        sites=tuple(problems[form].costs.sites[i] for i, form in enumerate(chosen)),
        residual=tuple(problems[form].costs.residual[i] for i, form in enumerate(chosen)),
    )
    return replace(problems[0], errors=errors, costs=costs)


def chosen_sites(sites: Sequence[Site], chosen: Sequence[int]) -> tuple[Site, ...]:
    """Return ``sites`` with the windows chosen; log how many have each form."""
    made = tuple(
        replace(site, window=site.windows[form]) if site.windows else site
        for site, form in zip(sites, chosen, strict=True)
    )
    forms = Counter(
        str(site.window) if isinstance(site.window, TileWindow) else "a band"
        for site in made
        if len(site.windows) > 1
    )
    for form, count in forms.items():
        log.info("windows: %s at %d sites, by measured errors and latency", form, count)
    return made
