"""What is known of sites, phase by phase: a generation that calls the model alike is one part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ditfastattn.passes.plan.phases import Span
from ditfastattn.runtime.search.candidates import Candidates
from ditfastattn.runtime.search.global_chooser import GlobalChooser
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.at_steps import at_steps
from ditfastattn.runtime.search.solve.rows import Row, dense_rows


@dataclass(frozen=True)
class Part:
    """Hold the work on the sites in one phase.

    Attributes:
        steps: of the phase, counted through the generation.
        work: whose session captured the model in this phase.
        chooser: chooses what sites do; None where there is no choice, as in a single step.
    """

    steps: range
    work: Work
    chooser: GlobalChooser | None = None

    @property
    def session(self) -> Session:
        """Return the session that captured the model in this phase."""
        return self.work.session

    @property
    def span(self) -> Span:
        """Return the steps, and how guidance reaches the model there."""
        return self.steps, self.session.layout

    def own(self, rows: Sequence[Row]) -> list[Row]:
        """Return those of ``rows`` that are of this phase."""
        return list(rows[self.steps.start : self.steps.stop])


class PartedCandidates:
    """Make the plans of each strength, the same in all parts, where only the steps ``runs`` run.

    A part without a choice is dense, and priced as the others are, by its guidance branches.
    """

    def __init__(self, parts: Sequence[Part], runs: Collection[int]) -> None:
        """Take the parts; one of them has a choice."""
        self._parts, self._runs = parts, runs
        self._candidates = [_candidates(part, runs) for part in parts]
        known = next(part.chooser for part in parts if part.chooser is not None)
        self.first, self.tries = known.first, known.tries

    def rows(self, strength: float) -> list[Row]:
        """Return the plan of this strength."""
        rows: list[Row] = []
        for part, own in zip(self._parts, self._candidates, strict=True):
            dense = dense_rows(len(part.steps), len(part.session.sites) - 1)
            rows += dense if own is None else own.rows(strength)
        return rows

    def speedup(self, rows: Sequence[Row]) -> float:
        """Return the predicted speedup of a plan."""
        return self._dense / sum(
            self._step(part) * len(part.steps) / own.speedup(part.own(rows))
            if own is not None
            else self._step(part) * len(part.steps)
            for part, own in zip(self._parts, self._candidates, strict=True)
        )

    @property
    def whole_steps(self) -> float:
        """Return the predicted speedup where sites take no shortcut."""
        ran = [sum(step in self._runs for step in part.steps) for part in self._parts]
        return self._dense / sum(
            self._step(part) * count for part, count in zip(self._parts, ran, strict=True)
        )

    @property
    def _dense(self) -> float:
        return sum(self._step(part) * len(part.steps) for part in self._parts)

    def _step(self, part: Part) -> float:
        """Return the price of all calls of a dense step of ``part``."""
        layout = part.session.layout
        if part.chooser is not None:
            return part.chooser.costs.step * layout.calls
        priced = [each for each in self._parts if each.chooser is not None]
        like = next((each for each in priced if each.session.layout is layout), priced[0])
        return self._step(like) * layout.branches / like.session.layout.branches


def _candidates(part: Part, runs: Collection[int]) -> Candidates | None:
    if part.chooser is None:
        return None
    own = [run - part.steps.start for run in runs if run in part.steps]
    problem = at_steps(part.chooser.problem, own)
    return Candidates(replace(part.chooser, problem=problem), merge_variants=False)
