"""Rows of strategies, one per step: the form in which a search makes and compares plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ditfastattn.passes.plan.strategies import Strategy, names_of

Row = tuple[Strategy, ...]


def dense_rows(steps: int, sites: int) -> list[Row]:
    """Return the plan that computes every site in full at every step."""
    return [(Strategy.FULL,) * sites] * steps


def takes_shortcuts(rows: Sequence[Row]) -> bool:
    """Return whether any site takes a shortcut at any step."""
    return any(strategy != Strategy.FULL for row in rows for strategy in row)


def digest_of(rows: Sequence[Row]) -> str:
    """Return a short hash that is equal for equal plans."""
    return hashlib.sha256(json.dumps(names_of(rows)).encode()).hexdigest()[:16]
