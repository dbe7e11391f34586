"""Which cases of a test run by default, and which with ``--all``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return ``cases`` for ``parametrize``, of which all but the ``quick`` ones are slow."""
    cases = list(cases)
    assert all(case in cases for case in quick)
    return [case if case in quick else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """Return a case of one argument, or a tuple of several, that runs with ``--all`` alone."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
