"""Follow the calls of a model: which step each is of, and whether it is of this generation at all.

The clock compares timesteps. Where those leave it open, since timesteps repeat, guidance takes two
calls or generations take turns, what the call shows decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.call_order import FIRST, Call, calls_in_order, other_calls, other_rows
from ditfastattn.runtime.clock import StepClock, TimestepReader
from ditfastattn.runtime.trace import (
    FRESH,
    NOTHING,
    Place,
    Shown,
    Trace,
    belongs_elsewhere,
    goes_on,
)

_MOST_LEFT = 256  # unfinished generations that are remembered, to refuse their calls


class InterleavedError(ConfigError):
    """Refuse a call of another generation than the one under way, which is left as it is."""


class Calls:
    """Follow the calls of one generation after another."""

    def __init__(self, clock: StepClock, order: Sequence[Call]) -> None:
        """Take the ``clock``, which counts all calls, and what these are, in ``order``."""
        self._clock, self._order = clock, order
        self._trace = Trace()
        self._images = 0  # of the generation under way: rows of each guidance branch
        self._left: deque[Trace] = deque(maxlen=_MOST_LEFT)  # unfinished, before this one

    @classmethod
    def of(cls, sampler: Sampler, where: str) -> Calls:
        """Return those of a generation by ``sampler``; ``where`` names the timestep."""
        order = calls_in_order(sampler.spans)
        return cls(StepClock([sampler.timesteps[call.step] for call in order], where), order)

    @property
    def at_end(self) -> bool:
        """Return whether the last call was the last one of its generation."""
        return self._clock.at_end

    def advance(
        self,
        timestep: TimestepReader,
        shown: Shown = NOTHING,
        wait: bool = False,
        rows: int = 0,
    ) -> Call:
        """Return which call this is; ``FIRST`` begins a new generation.

        With ``wait`` the timestep itself decides on a device too. ``rows`` are those of the batch;
        they are not compared where 0.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order, or the transformer is
                called with other rows, or more or less often in a step, than the plan has it.
            InterleavedError: the call goes on with a generation that is not the one under way.
        """
        before = self._clock.step
        begins = self._renamed(shown) or self._begins_anew(shown)
        try:
            number = self._clock.tick(timestep, wait=wait, anew=begins)
        except ConfigError as error:
            if any(goes_on(place, shown) for place in self._left_at(timestep.value())):
                self._clock.step = before
                raise _interleaved() from error
            explained = self._other_calls(before, timestep.value())
            if explained is None:
                raise
            raise explained from error
        call = self._order[number]
        left = self._left_at(self._clock.timesteps[number])
        if call == FIRST:
            elsewhere = any(goes_on(place, shown) for place in left)
        else:
            elsewhere = belongs_elsewhere(Place(self._trace, call), left, shown)
        if elsewhere:
            self._clock.step = before
            raise _interleaved()
        if call == FIRST:
            self._begin()
            self._images = rows // call.halves
        elif rows and self._images and rows != self._images * call.halves:
            raise self._other_rows(call, rows)
        self._trace.take(number, call, shown)
        return call

    def returned(self, output: Tensor) -> None:
        """Remember what the model has returned at the last call."""
        self._trace.returned(output)

    def other_rows(self, timestep: float, rows: int) -> ConfigError | None:
        """Return what is wrong with a call of so many ``rows``, if this generation awaits it."""
        last, clock = self._clock.step, self._clock
        if last < 0 or not self._images:
            return None
        if last + 1 < clock.calls and clock.matches(timestep, last + 1):
            due = self._order[last + 1]
            return None if rows == self._images * due.halves else self._other_rows(due, rows)
        if last > 0 and clock.matches(timestep, last):
            got = f"a further call at step {self._order[last].step}, with {rows} row(s)"
            return other_calls(self._order, got, clock.where)
        return None

    def reset(self) -> None:
        """Forget the generation under way: the next call is the first of another."""
        self._clock.reset()
        self._begin()

    def _begin(self) -> None:
        if 0 <= self._trace.number < self._clock.calls - 1:
            self._left.append(self._trace)
        self._trace = Trace()

    def _left_at(self, timestep: float) -> list[Place]:
        """Return the generations that were left where a call with ``timestep`` follows."""
        return [
            Place(trace, self._order[trace.number + 1])
            for trace in self._left
            if self._clock.matches(timestep, trace.number + 1)
        ]

    def _renamed(self, shown: Shown) -> bool:
        return shown.name is not None and shown.name is not self._trace.name

    def _begins_anew(self, shown: Shown) -> bool:
        """Return whether a call begins anew though its timestep is the next one's too.

        So it may be where a generation was left, and timesteps repeat or guidance takes two calls.
        """
        trace, following = self._trace, self._clock.repeats_first
        if following is None or (shown.name is not None and shown.name is trace.name):
            return False
        call, first = self._order[following], trace.first[FIRST.place]
        if call.branch and shown.same_latents(trace.steps[0].shown):
            return call.step == 0 and shown.repeats(first)
        if not shown.latents:
            return call.branch == 0 and trace.conditions(FIRST, shown) is False
        return shown.same_latents(first) or trace.unexplained(shown, call.halves) > FRESH

    def _other_calls(self, before: int, timestep: float) -> ConfigError | None:
        """Return what is wrong, if steps call the model more or less often than in the plan.

        The call came with ``timestep``, after the one numbered ``before``.
        """
        if before < 0:
            return None
        due = self._order[(before + 1) % len(self._order)]
        here = self._order[before]
        later = next((n for n, call in enumerate(self._order) if call.step == due.step + 1), None)
        if due.branch and later is not None and self._clock.matches(timestep, later):
            got = f"{due.branch} call at step {due.step}, then one of step {due.step + 1}"
        elif self._clock.matches(timestep, before):
            got = f"a further call at step {here.step}, after {here.branch + 1}"
        else:
            return None
        return other_calls(self._order, got, self._clock.where)

    def _other_rows(self, call: Call, rows: int) -> ConfigError:
        change = "off" if rows < self._images * call.halves else "on"
        got = f"{rows} row(s) at step {call.step}, as if guidance was switched {change}"
        return other_rows(self._order, self._images, got, self._clock.where)


def _interleaved() -> InterleavedError:
    return InterleavedError(
        "this call goes on with a generation that another one has taken the place of",
        where="generations in turns, on one thread",
        expected="a generation's calls one after another, or a context for each generation",
        remedy="make `g = ditfastattn.generation()` for each generation, and call the model "
        "within `with g:`",
    )
