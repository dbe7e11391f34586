"""Follow the calls of a model: which step each is of, and whether it is of this generation at all.

The clock compares timesteps. Where those leave it open, since timesteps repeat, guidance takes two
calls or generations take turns, what the call shows decides.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.core.errors import ConfigError
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


@dataclass(frozen=True)
class Call:
    """Say which call of a generation this is: its step, and its guidance branch in that step."""

    step: int
    branch: int


FIRST = Call(0, 0)


class Calls:
    """Follow the calls of one generation after another."""

    def __init__(self, clock: StepClock, per_step: int = 1, halves: int = 1) -> None:
        """Take the ``clock``, which counts all calls; a step has ``per_step``.

        ``halves`` says how many guidance branches a batch holds.
        """
        self._clock, self._per_step = clock, per_step
        self._trace = Trace(halves)
        self._left: deque[Trace] = deque(maxlen=_MOST_LEFT)  # unfinished, before this one

    @property
    def at_end(self) -> bool:
        """Return whether the last call was the last one of its generation."""
        return self._clock.at_end

    def advance(self, timestep: TimestepReader, shown: Shown = NOTHING, wait: bool = False) -> Call:
        """Return which call this is; ``FIRST`` begins a new generation.

        With ``wait`` the timestep itself decides on a device too.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order.
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
            raise
        call = Call(*divmod(number, self._per_step))
        left = self._left_at(self._clock.timesteps[number])
        if call == FIRST:
            elsewhere = any(goes_on(place, shown) for place in left)
        else:
            elsewhere = belongs_elsewhere(Place(self._trace, call.branch), left, shown)
        if elsewhere:
            self._clock.step = before
            raise _interleaved()
        if call == FIRST:
            self._begin()
        self._trace.take(number, call.branch, shown)
        return call

    def returned(self, output: Tensor) -> None:
        """Remember what the model has returned at the last call."""
        self._trace.returned(output)

    def reset(self) -> None:
        """Forget the generation under way: the next call is the first of another."""
        self._clock.reset()
        self._begin()

    def _begin(self) -> None:
        if 0 <= self._trace.number < self._clock.calls - 1:
            self._left.append(self._trace)
        self._trace = Trace(self._trace.halves)

    def _left_at(self, timestep: float) -> list[Place]:
        """Return the generations that were left where a call with ``timestep`` follows."""
        return [
            Place(trace, (trace.number + 1) % self._per_step)
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
        step, branch = divmod(following, self._per_step)
        if branch and shown.same_latents(trace.steps[0].shown):
            return step == 0 and shown.repeats(trace.first[0])
        if not shown.latents:
            return branch == 0 and trace.conditions(0, shown) is False
        return shown.same_latents(trace.first[0]) or trace.unexplained(shown) > FRESH


def _interleaved() -> InterleavedError:
    return InterleavedError(
        "this call goes on with a generation that another one has taken the place of",
        where="generations in turns, on one thread",
        expected="a generation's calls one after another, or a context for each generation",
        remedy="make `g = ditfastattn.generation()` for each generation, and call the model "
        "within `with g:`",
    )
