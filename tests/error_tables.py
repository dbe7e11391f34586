"""Make tables of errors for searches without measuring any."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditfastattn import Strategy
from ditfastattn.runtime.search.measure.error_table import ErrorTable, gap_choices

Array = NDArray[np.float64]
LINE_GAPS, GAP_PAIRS = gap_choices(2), gap_choices(3)
NAMED = {
    "share_step": Strategy.SHARE_STEP,
    "window": Strategy.WINDOW,
    "window_share_cfg": Strategy.WINDOW_SHARE_CFG,
    "share_cfg": Strategy.SHARE_CFG,
    "share_cfg_refresh": Strategy.SHARE_CFG_REFRESH,
    "extrapolate": Strategy.EXTRAPOLATE,
    "extrapolate_quadratic": Strategy.EXTRAPOLATE_QUADRATIC,
}


def table_of(**errors: Array) -> ErrorTable:
    """Return a table of the errors given, by the names of ``NAMED``; ``share_step`` is 3-D.

    Of windows the errors after a full step will do; that nothing refreshes is the default.
    """
    found = {NAMED[name]: array for name, array in errors.items()}
    found[Strategy.SHARE_STEP] = found[Strategy.SHARE_STEP][:, :, None]
    if "share_cfg_refresh" not in errors:
        found[Strategy.SHARE_CFG_REFRESH] = np.full_like(found[Strategy.SHARE_CFG], np.inf)
    for strategy, array in found.items():
        if strategy.windowed and array.shape[0] == array.shape[1]:  # the same for both residuals
            found[strategy] = np.concatenate([array, array], axis=1)
    return ErrorTable(found)


def of(table: ErrorTable, name: str) -> Array:
    """Return a view of one strategy's errors, as ``table_of`` takes them."""
    array = table.by_strategy[NAMED[name]]
    return array[:, :, 0] if name == "share_step" else array
