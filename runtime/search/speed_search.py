"""Search the gentlest plan that reaches a speed: choose by predictions, compile, and measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.runtime.search.bracket import LARGEST_MOVE, Bracket
from ditfastattn.runtime.search.candidates import Candidates, Found
from ditfastattn.runtime.search.judge.targets import Target, TargetKind
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.measure.timing import PairedTiming
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row, dense_rows

_MAX_ROUNDS = 3  # each compiles a plan


class SpeedSearch:
    """Find the gentlest plan that is measured fast enough."""

    def __init__(
        self,
        work: Work,
        candidates: Candidates,
        target: Target,
        measure: Callable[[Found], PairedTiming],
    ) -> None:
        """Take what the search works with; ``measure`` compiles and times a plan."""
        self._work = work
        self._candidates = candidates
        self._target = target
        self._measure = measure

    def run(self) -> tuple[Found, PairedTiming]:
        """Return the plan, and its timing.

        Raises:
            TargetMissedError: the fastest plan is not fast enough.
        """
        wanted = self._target.bound if self._target.kind is TargetKind.SPEEDUP else 1.0
        correction, rounds = 1.0, 0
        while True:
            rounds += 1
            self._work.begin(f"choosing a plan of {wanted * correction:.2f}x")
            found = gentlest(self._candidates, self._work.session, wanted * correction, rounds)
            self._work.begin(f"round {rounds}: compiling and timing the plan")
            timing = self._measure(found)
            if self._is_fast(timing):
                return found, timing
            predicted = self._candidates.speedup(found.rows)
            if rounds == _MAX_ROUNDS or predicted < wanted * correction:
                raise self._too_slow(timing)
            if self._target.kind is TargetKind.LATENCY:
                wanted = timing.baseline.median / self._target.bound
            correction = max(1.0, 1.01 * predicted / timing.speedup.median)

    def _is_fast(self, timing: PairedTiming) -> bool:
        speedup = self._target.kind is TargetKind.SPEEDUP
        return self._target.met_by(timing.speedup.median if speedup else timing.candidate.median)

    def _too_slow(self, timing: PairedTiming) -> TargetMissedError:
        speedup, seconds = timing.speedup.median, timing.candidate.median
        return TargetMissedError(
            "no plan is fast enough",
            where=self._target.describe(),
            got=f"{speedup:.2f}x, {seconds:.3g} s per generation",
            expected=self._target.bound,
            remedy="ask for less, or for fewer sampler steps",
        )


class ByStrength(Protocol):
    """Plans of any strength, and how fast they promise to be."""

    @property
    def first(self) -> float:
        """Return the strength to begin with."""
        ...

    @property
    def tries(self) -> int:
        """Return how many plans may be made in looking for one."""
        ...

    def rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength."""
        ...

    def speedup(self, rows: Sequence[Row]) -> float:
        """Return the predicted speedup of a plan."""
        ...


def gentlest(candidates: ByStrength, session: Session, speedup: float, rounds: int = 0) -> Found:
    """Return the gentlest plan of a predicted ``speedup``, or the fastest there is."""
    rows = dense_rows(session.steps, len(session.sites))
    if speedup <= 1.0:
        return Found(rows, 0.0, rounds=rounds)
    bracket = Bracket(candidates.first)
    best: Found | None = None
    for _ in range(candidates.tries):
        rows = candidates.rows(bracket.strength)
        fast = candidates.speedup(rows) >= speedup
        if fast and (best is None or bracket.strength < best.strength):
            best = Found(rows, bracket.strength, rounds=rounds)
        bracket.record(not fast)
        if bracket.closed:
            break
        bracket.move(LARGEST_MOVE if fast else 1.0 / LARGEST_MOVE)
    return best or Found(rows, bracket.strength, rounds=rounds)
