"""One image that is asked for, from its request until it is made or given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ditfastattn.runtime.plan_choice import Choice


@dataclass(frozen=True)
class Kind:
    """What images that are generated together have in common: they run by one plan."""

    tier: str
    steps: int
    guidance: float | None  # None: the pipeline's default
    height: int  # 0: the pipeline's only size
    width: int


@dataclass(frozen=True)
class Wanted:
    """One image: what it shows, and its seed."""

    kind: Kind
    condition: str | int  # a prompt, or a class
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class Made:
    """One image as a PNG, and what ran it."""

    png: bytes
    seed: int
    choice: Choice
    seconds: float  # that its batch took
    batch: int


class StoppedError(Exception):
    """Report a generation that was given up: nobody waits for any of its images any more."""


@dataclass(eq=False)
class Job:
    """An image that somebody waits for until ``deadline``, by ``time.monotonic``."""

    wanted: Wanted
    deadline: float
    on_step: Callable[[int, int], None] = lambda _step, _steps: None
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    began: float = 0.0

    def given_up(self) -> bool:
        """Return whether nobody waits for it any more."""
        return self.cancelled or time.monotonic() > self.deadline
