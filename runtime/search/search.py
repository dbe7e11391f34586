"""Search the fastest plan that meets a target, and check it on prompts it has not seen.

The outer search turns one number, the strength of a plan. For a quality it starts where the
damage is expected to be the allowed one and goes on by the ratio of what was measured; a plan is
taken when the *worst* calibration prompt meets the target, and then the worst held-out prompt. For
a speed it takes the gentlest plan predicted fast enough, compiles it, and measures.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from ditfastattn.core.errors import TargetMissedError
from ditfastattn.passes.plan.schema import Calibration, Measured, Plan, SearchMethod
from ditfastattn.passes.plan.strategies import Strategy, names_of
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.bracket import AIM, LARGEST_MOVE, Bracket
from ditfastattn.runtime.search.judge.targets import Judgement, Target, TargetKind
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.timing import PairedTiming
from ditfastattn.runtime.search.methods import Chooser, Method
from ditfastattn.runtime.search.record.planned_target import record_target, record_values
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.problem import Row

MAX_ROUNDS = 6
MAX_SPEED_ROUNDS = 3  # each compiles a plan
_CLOSE = 0.5  # the part of the allowed damage that a plan should use, at the worst prompt
_WORTH = 1.1  # or else a further round goes for a plan that is predicted faster by this much
_MOST_MOVES = 40


@dataclass(frozen=True)
class SearchOptions:
    """Hold what a search is to do; ``max_variants`` 0 and ``max_cache_bytes`` 0 are no cap."""

    target: Target
    method: Method = Method.GLOBAL
    objective: Objective = Objective.LATENCY
    max_variants: int = 0
    max_cache_bytes: int = 0
    max_rounds: int = MAX_ROUNDS
    lowering: Lowering = Lowering.INDUCTOR
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """Hold a plan's rows and what was measured of them."""

    rows: list[Row]
    strength: float
    calibrated: Sequence[float] = ()
    held_out: Sequence[float] = ()
    rounds: int = 0


class Search:
    """Search one plan."""

    def __init__(
        self,
        work: Work,
        chooser: Chooser,
        options: SearchOptions,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
    ) -> None:
        """Take what the search works with."""
        self._work = work
        self._chooser = chooser
        self._options = options
        self._target = options.target
        self._prompts = prompts
        self._held_out = held_out
        self._judged: dict[tuple[str, str, int], list[Judgement]] = {}
        self._hardness: dict[tuple[str, int], float] = {}  # by the last plan
        self._plans: dict[float, list[Row]] = {}

    def quality(self) -> Found:
        """Return the strongest plan whose worst calibration and held-out prompts meet the target.

        Where none does within the rounds, the dense plan. A plan that comes up again costs nothing.

        Raises:
            TargetMissedError: even the dense images miss the target.
        """
        bracket = Bracket(self._chooser.first, self._chooser.order)
        best: Found | None = None
        goal, rounds, seen, refuted = 1.0, 0, set[str](), set[str]()
        untested: dict[str, float] = {}  # what meets the target here, and was not tried elsewhere
        for _ in range(_MOST_MOVES):
            strength, rows = bracket.strength, self._rows(bracket.strength)
            rounds += _digest(rows) not in seen
            if rounds > self._options.max_rounds:
                break
            seen.add(_digest(rows))
            self._work.begin(f"round {rounds}: the calibration prompts")
            judged = self._judge("calibration", rows, self._prompts)
            met = self._met(judged)
            ratio = _ratio(judged, met) / goal
            met = met and ratio <= 1.0 and _digest(rows) not in refuted
            last = bracket.closing(met) or rounds == self._options.max_rounds
            close = ratio >= _CLOSE or self._strongest(rows) or last
            if met and (close or not self._worth_a_round(bracket.after(ratio), rows)):
                self._work.begin(f"round {rounds}: the held-out prompts")
                checked = self._judge("held-out", rows, self._held_out)
                if self._met(checked):
                    best = self._found(rows, strength, judged, checked, rounds)
                    break
                met = False
                refuted.add(_digest(rows))
                bracket.low = 0.0  # what meets the target here may miss it on unseen prompts
                known, unseen = _ratio(judged, True), _ratio(checked, False)
                if all(item.allowed for item in judged) and known > 0.0 and math.isfinite(unseen):
                    goal = min(goal, known / unseen)  # unseen prompts are harder by this much
                ratio = max(unseen, _ratio(judged, met) / goal)
            elif self._met(judged) and _changes(rows):
                untested[_digest(rows)] = strength
            bracket.record(met)
            bracket.move(ratio)
        gentle = min((untested[key] for key in untested.keys() - refuted), default=0.0)
        return best or self._fall_back((bracket.low, gentle), rounds)

    def _rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength, made once."""
        if strength not in self._plans:
            self._plans[strength] = self._chooser.rows(strength)
        return self._plans[strength]

    def _worth_a_round(self, strength: float, rows: list[Row]) -> bool:
        """Tell whether a plan of ``strength`` is faster than ``rows`` by what a round is worth.

        Where a plan costs a pass, nothing is predicted, and it is.
        """
        if not self._chooser.predicts:
            return True
        return self._speedup(self._rows(strength)) >= _WORTH * self._speedup(rows)

    def _fall_back(self, strengths: Sequence[float], rounds: int) -> Found:
        """Return the first plan of ``strengths`` that unseen prompts agree with, else dense."""
        rounds = min(rounds, self._options.max_rounds)
        plans = [(strength, self._rows(strength)) for strength in strengths if strength]
        plans = [(strength, rows) for strength, rows in plans if _changes(rows)]
        judged: list[Judgement] = []
        checked: list[Judgement] = []
        for strength, rows in (*plans, (0.0, self._dense_rows())):
            judged = self._judge("calibration", rows, self._prompts)
            checked = self._judge("held-out", rows, self._held_out)
            if self._met(judged) and self._met(checked):
                return self._found(rows, strength, judged, checked, rounds)
        worst = self._target.worst([item.value for item in (*judged, *checked)])
        raise TargetMissedError(
            "even the dense model misses the target",
            where=self._target.describe(),
            got=f"{worst:g} on the worst prompt",
            expected=self._target.bound,
            remedy="choose a bound that the dense images meet",
        )

    def threshold(self) -> Found:
        """Return the plan of the target's own strength."""
        return Found(self._rows(self._target.bound), self._target.bound, rounds=1)

    def speed(self, measure: Callable[[Plan], PairedTiming]) -> tuple[Found, PairedTiming]:
        """Return the gentlest plan that is measured fast enough.

        Raises:
            TargetMissedError: the fastest plan is not fast enough.
        """
        wanted = self._target.bound if self._target.kind is TargetKind.SPEEDUP else 1.0
        correction, rounds = 1.0, 0
        while True:
            rounds += 1
            found = self._fast_enough(wanted * correction, rounds)
            self._work.begin(f"round {rounds}: compiling and timing the plan")
            timing = measure(self.plan(found, 0.0))
            if self._fast(timing):
                return found, timing
            fastest = self._speedup(found.rows) < wanted * correction
            if rounds == MAX_SPEED_ROUNDS or fastest:
                raise self._too_slow(timing.speedup.median, timing.candidate.median)
            if self._target.kind is TargetKind.LATENCY:
                wanted = timing.baseline.median / self._target.bound
            predicted = self._speedup(found.rows)
            correction = max(1.0, 1.01 * predicted / timing.speedup.median)

    def _fast(self, timing: PairedTiming) -> bool:
        speedup = self._target.kind is TargetKind.SPEEDUP
        return self._target.met_by(timing.speedup.median if speedup else timing.candidate.median)

    def _fast_enough(self, speedup: float, rounds: int) -> Found:
        """Return the gentlest plan of a predicted ``speedup``, or the fastest there is."""
        if speedup <= 1.0:
            return Found(self._dense_rows(), 0.0, rounds=rounds)
        bracket = Bracket(self._chooser.first)
        best: Found | None = None
        rows = self._dense_rows()
        for _ in range(self._chooser.tries):
            self._work.begin(f"choosing a plan of {speedup:.2f}x")
            rows = self._rows(bracket.strength)
            fast = self._speedup(rows) >= speedup
            if fast and (best is None or bracket.strength < best.strength):
                best = Found(rows, bracket.strength, rounds=rounds)
            bracket.record(not fast)
            if bracket.closed:
                break
            bracket.move(LARGEST_MOVE if fast else 1.0 / LARGEST_MOVE)
        return best or Found(rows, bracket.strength, rounds=rounds)

    def _too_slow(self, speedup: float, seconds: float) -> TargetMissedError:
        return TargetMissedError(
            "no plan is fast enough",
            where=self._target.describe(),
            got=f"{speedup:.2f}x, {seconds:.3g} s per generation",
            expected=self._target.bound,
            remedy="ask for less, or for fewer sampler steps",
        )

    def plan(self, found: Found, seconds: float, timing: PairedTiming | None = None) -> Plan:
        """Return the plan with its record."""
        options = self._options
        calibration = Calibration(
            method=cast(SearchMethod, options.method.value),  # auto has been resolved
            target=record_target(self._target),
            strength=found.strength,
            seed=options.seed,
            calibrated=self._recorded(found.calibrated),
            held_out=self._recorded(found.held_out),
            predicted_speedup=round(self._speedup(found.rows), 3),
            measured_speedup=timing and round(timing.speedup.median, 3),
            measured_seconds=timing and round(timing.candidate.median, 4),
            rounds=found.rounds,
            forwards=round(self._work.forwards, 1),
            seconds=round(seconds, 1),
        )
        timesteps, capped = self._work.timesteps, options.max_variants > 0
        return self._work.session.plan(found.rows, timesteps, calibration, capped)

    def _recorded(self, values: Sequence[float]) -> Measured | None:
        return record_values(self._target, values) if values else None

    def _judge(self, group: str, rows: list[Row], prompts: Sequence[Prompt]) -> list[Judgement]:
        """Compare the plan's images with dense ones, up to the first prompt that misses the target.

        The hardest prompts come first: those that the last plan damaged most.
        """
        order = sorted(range(len(prompts)), key=lambda k: -self._hardness.get((group, k), 0.0))
        judged: list[Judgement] = []
        for index in order:
            found = self._judge_prompt(group, rows, index, prompts[index])
            met = self._met(found)
            self._hardness[group, index] = _ratio(found, met)
            judged += found
            if not met:
                break
        return judged

    def _judge_prompt(
        self, group: str, rows: list[Row], index: int, prompt: Prompt
    ) -> list[Judgement]:
        """Judge one prompt's images, once per plan, kept in the checkpoint."""
        work = self._work
        if not _changes(rows):
            dense = work.dense(group, index, prompt)
            return self._target.judge(dense, dense, prompt.call)

        def make() -> list[tuple[float, float, float | None]]:
            judged = work.judge(group, index, rows, prompt, self._target)
            return [(item.value, item.damage, item.allowed) for item in judged]

        key = (group, _digest(rows), index)
        if key not in self._judged:
            kept = work.checkpoint.data("-".join(map(str, key)), make)
            self._judged[key] = [Judgement(*item) for item in kept]
        return self._judged[key]

    def _met(self, judged: Sequence[Judgement]) -> bool:
        return all(self._target.met_by(item.value) for item in judged)

    def _found(
        self,
        rows: list[Row],
        strength: float,
        judged: Sequence[Judgement],
        checked: Sequence[Judgement],
        rounds: int,
    ) -> Found:
        calibrated = [item.value for item in judged]
        return Found(rows, strength, calibrated, [item.value for item in checked], rounds)

    def _speedup(self, rows: list[Row]) -> float:
        return self._chooser.costs.speedup(rows, self._options.max_variants > 0)

    def _dense_rows(self) -> list[Row]:
        session = self._work.session
        return [(Strategy.FULL,) * len(session.sites)] * session.steps

    def _strongest(self, rows: list[Row]) -> bool:
        """Tell whether every step but the first already takes the cheapest strategy everywhere."""
        costs = self._chooser.costs
        cheapest = [min(prices.values()) for prices in costs.sites]
        return all(
            costs.sites[index][strategy] <= cheapest[index]
            for row in rows[1:]
            for index, strategy in enumerate(row)
        )


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(names_of(rows)).encode()).hexdigest()[:16]


def _changes(rows: Sequence[Row]) -> bool:
    return any(strategy != Strategy.FULL for row in rows for strategy in row)


def _ratio(judged: Sequence[Judgement], met: bool) -> float:
    """Return the worst ratio of actual to allowed damage."""
    return max(_ratio_of(item, met) for item in judged)


def _ratio_of(item: Judgement, met: bool) -> float:
    if item.allowed is None:  # nothing tells how far it is: go far, then halve the bracket
        return AIM / LARGEST_MOVE if met else AIM * LARGEST_MOVE
    if item.allowed <= 0.0:
        return 0.0 if item.damage <= 0.0 else math.inf
    return max(item.damage, 0.0) / item.allowed
