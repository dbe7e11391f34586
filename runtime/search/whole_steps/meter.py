"""Count the forward passes of a search, and report them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ditfastattn.runtime.search.record.work import SearchProgress


@dataclass
class Meter:
    """Count forward passes of one image; ``at_most`` are expected."""

    at_most: float
    on_progress: Callable[[SearchProgress], None] | None = None
    forwards: float = 0.0
    phase: str = ""
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Return the seconds since the search began."""
        return time.monotonic() - self._began

    def begin(self, phase: str) -> None:
        """Begin a phase of the search, and report it."""
        self.phase = phase
        self.spend(0.0)

    def spend(self, forwards: float) -> None:
        """Count ``forwards``, and report."""
        self.forwards += forwards
        if self.on_progress is not None:
            expected = max(self.at_most, self.forwards)
            pace = self.seconds / self.forwards if self.forwards else 0.0
            left = (expected - self.forwards) * pace
            self.on_progress(
                SearchProgress(self.phase, self.forwards, self.at_most, left, expected)
            )
