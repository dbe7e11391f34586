"""The calls of a generation in order: which step, phase and guidance branch each is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.phases import Span, in_runs


@dataclass(frozen=True)
class Call:
    """Say which call of a generation this is: its step, and its guidance branch in that step.

    ``phase`` is that of the step, and ``halves`` says how many guidance branches the batch holds.
    """

    step: int
    branch: int
    phase: int = field(default=0, compare=False)
    halves: int = field(default=1, compare=False)

    @property
    def place(self) -> tuple[int, int]:
        """Return what calls of equal conditions have in common: phase and guidance branch."""
        return self.phase, self.branch


FIRST = Call(0, 0)


class OtherCallsError(ConfigError):
    """Refuse a call, before it runs, that the plan does not have at this place of a generation."""


def calls_in_order(spans: Sequence[Span]) -> tuple[Call, ...]:
    """Return the calls of a generation whose phases are ``spans``."""
    return tuple(
        Call(step, branch, phase, 2 if layout.batched else 1)
        for phase, (steps, layout) in enumerate(spans)
        for step in steps
        for branch in range(layout.calls)
    )


def other_calls(order: Sequence[Call], got: str, where: str) -> OtherCallsError:
    """Return the error for steps that call the model more or less often than in ``order``."""
    counts = Counter(call.step for call in order)
    planned = [f"{count} call(s)" for count in counts.values()]
    return _differs(
        "unexpected timestep: how often each step calls the transformer", got, planned, where
    )


def other_rows(order: Sequence[Call], images: int, got: str, where: str) -> OtherCallsError:
    """Return the error for a call with other rows than in ``order``, of so many ``images``."""
    rows = {call.step: images * call.halves for call in order}
    planned = [f"{count} row(s)" for count in rows.values()]
    return _differs("how many rows the transformer is called with", got, planned, where)


def _differs(what: str, got: str, planned: Sequence[str], where: str) -> OtherCallsError:
    return OtherCallsError(
        f"{what} differs from the plan",
        where=where,
        got=got,
        expected=in_runs(planned),
        remedy="guide the steps that the plan was calibrated with (its sampler.phases), or "
        "calibrate a plan for this guidance",
    )
