"""Search the fastest plan whose images meet a quality.

The search starts at the strength where the damage is expected to be the allowed one, and moves by
the ratio of what was measured. A plan is taken when the *worst* calibration prompt meets the
target, and then the worst held-out prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ditfastattn.runtime.search.bracket import Bracket
from ditfastattn.runtime.search.candidates import Candidates, Found
from ditfastattn.runtime.search.judge.image_judge import (
    CALIBRATION,
    HELD_OUT,
    ImageJudge,
    damage_ratio,
)
from ditfastattn.runtime.search.judge.judgement import Judgement, dense_misses
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.rows import Row, dense_rows, digest_of, takes_shortcuts

_CLOSE = 0.5  # the part of the allowed damage that a plan should use, at the worst prompt
_WORTH = 1.1  # otherwise another round must promise a plan faster by this factor
_MOST_MOVES = 40


class QualitySearch:
    """Find the strongest plan whose worst calibration and held-out prompts meet the target."""

    def __init__(
        self, work: Work, candidates: Candidates, judge: ImageJudge, max_rounds: int
    ) -> None:
        """Take what the search works with; a round judges one new plan."""
        self._work = work
        self._candidates = candidates
        self._judge = judge
        self._max_rounds = max_rounds
        self._bracket = Bracket(candidates.chooser.first, candidates.chooser.order)
        self._rounds = 0
        self._goal = 1.0  # the part of the allowed damage to aim at: unseen prompts may be harder
        self._seen: set[str] = set()
        self._refuted: set[str] = set()  # plans that held-out prompts refused
        self._untested: dict[str, float] = {}  # plans that meet the target on calibration prompts

    def run(self) -> Found:
        """Return the plan; the dense one if none meets the target within the rounds.

        A plan that comes up again costs nothing.

        Raises:
            TargetMissedError: even the dense images miss the target.
        """
        for _ in range(_MOST_MOVES):
            strength = self._bracket.strength
            rows = self._candidates.rows(strength)
            self._rounds += digest_of(rows) not in self._seen
            if self._rounds > self._max_rounds:
                break
            self._seen.add(digest_of(rows))
            found = self._try(strength, rows)
            if found is not None:
                return found
        return self._fall_back()

    def _try(self, strength: float, rows: list[Row]) -> Found | None:
        """Return the plan ``rows`` if the search ends with it; else move on to another strength."""
        self._work.begin(f"round {self._rounds}: the calibration prompts")
        judged = self._judge.judge(CALIBRATION, rows)
        all_met = self._judge.meets_target(judged)
        ratio = damage_ratio(judged, all_met) / self._goal
        met = all_met and ratio <= 1.0 and digest_of(rows) not in self._refuted
        if met and self._is_strong_enough(rows, ratio):
            self._work.begin(f"round {self._rounds}: the held-out prompts")
            checked = self._judge.judge(HELD_OUT, rows)
            if self._judge.meets_target(checked):
                return self._found(rows, strength, judged, checked)
            met, ratio = False, self._refute(rows, judged, checked)
        elif all_met and takes_shortcuts(rows):
            self._untested[digest_of(rows)] = strength
        self._bracket.record(met)
        self._bracket.move(ratio)
        return None

    def _is_strong_enough(self, rows: list[Row], ratio: float) -> bool:
        """Return whether no further round is worth its cost, once ``rows`` meets the target."""
        last = self._bracket.closing(True) or self._rounds == self._max_rounds
        if ratio >= _CLOSE or self._candidates.is_strongest(rows) or last:
            return True
        if not self._candidates.chooser.predicts:  # only a pass would show what another plan saves
            return False
        next_rows = self._candidates.rows(self._bracket.after(ratio))
        return self._candidates.speedup(next_rows) < _WORTH * self._candidates.speedup(rows)

    def _refute(
        self, rows: list[Row], judged: Sequence[Judgement], checked: Sequence[Judgement]
    ) -> float:
        """Note that held-out prompts refuse ``rows``; return the ratio of damage to move by."""
        self._refuted.add(digest_of(rows))
        self._bracket.low = 0.0  # what meets the target here may miss it on unseen prompts
        known, unseen = damage_ratio(judged, True), damage_ratio(checked, False)
        if all(item.allowed for item in judged) and known > 0.0 and math.isfinite(unseen):
            self._goal = min(self._goal, known / unseen)  # unseen prompts are harder by this much
        return max(unseen, damage_ratio(judged, False) / self._goal)

    def _fall_back(self) -> Found:
        """Return the first remaining plan that held-out prompts accept; the dense one at last."""
        untested = self._untested.keys() - self._refuted
        gentle = min((self._untested[key] for key in untested), default=0.0)
        strengths = [strength for strength in (self._bracket.low, gentle) if strength]
        plans = [(strength, self._candidates.rows(strength)) for strength in strengths]
        plans = [(strength, rows) for strength, rows in plans if takes_shortcuts(rows)]
        session = self._work.session
        dense = dense_rows(session.steps, len(session.sites))
        judged: list[Judgement] = []
        checked: list[Judgement] = []
        for strength, rows in (*plans, (0.0, dense)):
            judged = self._judge.judge(CALIBRATION, rows)
            checked = self._judge.judge(HELD_OUT, rows)
            if self._judge.meets_target(judged) and self._judge.meets_target(checked):
                return self._found(rows, strength, judged, checked)
        raise dense_misses(self._judge.target, (*judged, *checked))

    def _found(
        self,
        rows: list[Row],
        strength: float,
        judged: Sequence[Judgement],
        checked: Sequence[Judgement],
    ) -> Found:
        return Found(
            rows=rows,
            strength=strength,
            calibrated=[item.value for item in judged],
            held_out=[item.value for item in checked],
            rounds=min(self._rounds, self._max_rounds),
        )
