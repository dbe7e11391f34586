"""A generation that ends early, at any call and in any way, leaves nothing to the next one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

import ditfastattn
from ditfastattn import CfgLayout
from ditfastattn.runtime.caches import Caches
from tests.helpers import largest_difference, tiny_dit
from tests.requests import (
    KINDS,
    REPEATED,
    TIMESTEPS,
    Holder,
    Request,
    served_model,
    take_turns,
    uniform_plan,
)
from tests.tiers import slow_but
from tests.works_with import works_with

SCHEDULES = {"falling": TIMESTEPS, "repeated": REPEATED, "colliding": (996.0, 996.0, 500.0, 500.0)}
NEXT: dict[str, Any] = {"the same": {}, "another seed": {"seed": 2}, "another prompt": {"label": 4}}
CASES = list(product(("dropped", "raised", "interrupted"), KINDS, SCHEDULES, NEXT))
QUICK = {
    ("dropped", ("accelerated", "separate"), "repeated", "another seed"),
    ("interrupted", ("bundled", "cond-first"), "colliding", "the same"),
}


class Cancelled(Exception):  # noqa: N818  # a user's own
    """End a generation within a call of its model."""


def interrupt() -> None:
    """Do what Ctrl-C does, also in a process that ignores it, as those of pytest-xdist."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def fail() -> None:
    """Fail as a runtime may."""
    raise Cancelled


def cancel(
    run: Any, request: Request, calls: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End a generation after some ``calls``, the last of which does not return but if dropped."""
    if way == "dropped":
        going = request.calls(run)
        for _ in range(calls):
            next(going)
        return
    end: Callable[[], None] = interrupt if way == "interrupted" else fail
    left = [None] * (calls - 1)
    write = Caches.write

    def ending(*args: Any) -> None:
        write(*args)
        if not left:
            end()
        left.pop()

    with monkeypatch.context() as patched:
        patched.setattr(Caches, "write", ending)
        with pytest.raises((Cancelled, KeyboardInterrupt)):
            request.run(run)


@works_with(
    "Generations in turns",
    "a generation that is cancelled (Ctrl-C, an error, dropped), at any call",
    "works",
    "the next one equals a clean one; two calls a step, one seed, no scheduler: refused once",
)
@pytest.mark.parametrize(("way", "kind", "schedule", "following"), slow_but(QUICK, CASES))
def test_the_next_generation_equals_a_clean_one(
    way: str,
    kind: tuple[str, str],
    schedule: str,
    following: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, timesteps = CfgLayout(kind[1]), SCHEDULES[schedule]
    run = served_model(kind[0], uniform_plan(layout, timesteps), tmp_path)
    request = Request(1, 1, layout, timesteps)
    then = replace(request, **NEXT[following])
    expected = then.run(run)
    for calls in range(1, len(timesteps) * layout.calls + 1):
        cancel(run, request, calls, way, monkeypatch)
        if calls == 1 and (way, kind[1], following) == ("dropped", "separate", "another prompt"):
            # Latents of one seed, of which the second may be the first one's unconditional call.
            (served,) = take_turns([then.calls(run)])
            assert served.refused is not None
            assert largest_difference(served.outputs, expected[: len(served.outputs)]) < 1e-6
            ditfastattn.reset()
        assert largest_difference(then.run(run), expected) == 0.0, f"cancelled at call {calls}"
        assert largest_difference(then.run(run), expected) == 0.0


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    ditfastattn.restore(Holder(tiny_dit().model))
