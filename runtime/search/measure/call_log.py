"""How one generation calls its transformer: how often in each step, and with how many rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.phases import Span, in_runs
from ditfastattn.runtime.call_order import calls_in_order
from ditfastattn.runtime.pipeline.sampler import counting_steps


class ChangingCallsError(ConfigError):
    """Refuse a generation whose steps call the transformer differently."""


@dataclass(frozen=True)
class SearchedPhase:
    """Say which phase of a generation a search is of; the others run dense.

    ``order`` holds the phase of each call of a generation.
    """

    number: int
    order: tuple[int, ...]


def searched_phases(spans: Sequence[Span]) -> tuple[SearchedPhase, ...]:
    """Return each phase of ``spans`` as what a search is of."""
    order = tuple(call.phase for call in calls_in_order(spans))
    return tuple(SearchedPhase(number, order) for number in range(len(spans)))


class CallLog:
    """Hold the calls of the transformer in one generation.

    Rounding may give several steps the same timestep, so the sampler's steps are counted where it
    shows them.
    """

    def __init__(self, all_searched: bool = False) -> None:
        """Begin with no call; where ``all_searched``, those to come are of the phase searched."""
        self.all_searched = all_searched
        self.timesteps: list[float] = []
        self.calls = 0  # in all phases
        self._after: list[int] = []  # how often the scheduler had stepped before each call
        self._sampled: Callable[[], int] = lambda: 0
        self._stepped = False  # the scheduler, in this generation

    @contextmanager
    def following(self, pipeline: Any) -> Generator[None]:
        """Count the sampler's steps while the generation runs within."""
        with counting_steps(pipeline) as self._sampled:
            yield
            self._stepped = self._sampled() > 0

    def note(self, timestep: float) -> None:
        """Note a call."""
        self._after.append(self._sampled())
        self.timesteps.append(timestep)

    def is_regular(self, calls: int, runs: Sequence[int]) -> bool:
        """Return whether each step has called the transformer ``calls`` times.

        ``runs`` counts runs of calls that are of one step for sure.
        """
        seen = self.timesteps
        if self._stepped:
            return all(count == calls for count in Counter(self._after).values())
        return max(runs) <= calls and seen[::calls] == seen[calls - 1 :: calls]

    def described(self) -> str:
        """Return what the steps did with the transformer."""
        if self._stepped:
            counts = list(Counter(self._after).values())
        else:  # runs of one timestep are steps, as far as can be seen
            counts = [len(list(run)) for _, run in groupby(self.timesteps)]
        return in_runs([f"{count} call" if count == 1 else f"{count} calls" for count in counts])

    def check_rows(self, wanted: int, got: int, calls: int) -> None:
        """Refuse a generation that changes how many rows it calls the transformer with.

        Raises:
            ConfigError: this call has ``got`` rows, and the first one had ``wanted``.
        """
        if wanted == got or not self.timesteps:
            return
        step = self._sampled() if self._sampled() else len(self.timesteps) // calls
        rows = [f"{wanted} row(s)"] * step + [f"{got} row(s)"]
        within = bool(self._sampled()) and self._after[-1] == self._sampled()
        raise ChangingCallsError(
            "the transformer was called with another number of rows within a generation",
            where="a generation",
            got=f"{wanted} row(s), then {got} row(s) at step {step}: a further call, such as that "
            "of skip-layer guidance"
            if within
            else f"{in_runs(rows)} on: guidance was switched {'off' if got < wanted else 'on'}",
            expected="the same calls at each step",
            remedy="keep guidance as it is from the first step to the last",
        )
