"""Turns of generations on one device: one computes at a time, and each step hands the turn on.

Whoever waits is served in the order of arrival, so n generations under way advance one step each
per round, and a short one ends after about n times its own steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from ditfastattn.serving.job import StoppedError

_LOOK: Final = 0.02  # seconds after which one that waits looks whether it is still wanted


class Turns:
    """The right to compute, which one thread holds at a time."""

    def __init__(self) -> None:
        """Begin with nobody's turn."""
        self._changed = threading.Condition()
        self._waiting: deque[Turn] = deque()
        self._holder: Turn | None = None

    @contextmanager
    def turn(self, given_up: Callable[[], bool] = lambda: False) -> Generator[Turn]:
        """Wait for the turn, and hold it until the block ends.

        Raises:
            StoppedError: ``given_up`` was true while it waited, here or in ``hand_on``.
        """
        own = Turn(self, given_up)
        self.take(own)
        try:
            yield own
        finally:
            self.give(own)

    def take(self, turn: Turn) -> None:
        """Wait until ``turn`` is the first of those that wait, and nobody computes."""
        with self._changed:
            self._waiting.append(turn)
            try:
                while self._holder is not None or self._waiting[0] is not turn:
                    if turn.given_up():
                        raise StoppedError
                    self._changed.wait(_LOOK)
                self._holder = turn
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def give(self, turn: Turn) -> None:
        """Let the next one compute; nothing changes where ``turn`` does not."""
        with self._changed:
            if self._holder is turn:
                self._holder = None
                self._changed.notify_all()

    @property
    def awaited(self) -> bool:
        """Return whether somebody waits."""
        return bool(self._waiting)


class Turn:
    """The turn of one generation, which comes and goes."""

    def __init__(self, turns: Turns, given_up: Callable[[], bool]) -> None:
        """Wait in ``turns`` for as long as the generation is not ``given_up``."""
        self._turns, self.given_up = turns, given_up

    def hand_on(self) -> None:
        """Let those compute that wait, if any, and wait for the next turn.

        Raises:
            StoppedError: the generation was given up meanwhile; it does not hold the turn then.
        """
        if self._turns.awaited:
            self._turns.give(self)
            self._turns.take(self)
