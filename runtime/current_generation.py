"""Say which generation calls of a model belong to, and keep the state of each one apart.

By default that is the one under way in the calling thread. Where a caller runs several in turns, it
says so by ``generation()``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Self, TypeVar

from torch import Tensor

from ditfastattn.runtime.trace import Shown, show

_State = TypeVar("_State")

_entered: ContextVar[tuple[GenerationContext, ...]] = ContextVar(
    "ditfastattn_generations", default=()
)
_named: ContextVar[object | None] = ContextVar("ditfastattn_generation", default=None)


class GenerationContext:
    """Hold the clock and the caches of one generation, for each model that it calls."""

    def __init__(self) -> None:
        """Begin with none; use ``generation()``."""
        self._states: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Self:
        """Let the calls of models that follow be of this generation."""
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        """Let them be of the one before again; this one can be entered again."""
        _entered.set(_entered.get()[:-1])

    def state(self, holder: object, make: Callable[[], _State]) -> _State:
        """Return what this generation keeps for ``holder``, made if there is nothing."""
        if holder not in self._states:
            self._states[holder] = make()
        found: _State = self._states[holder]
        return found


def generation() -> GenerationContext:
    """Return a context for the calls of one generation, where several run in turns.

    A thread has one generation under way, so those that take turns on it (a scheduler of single
    steps, tasks of asyncio) must say which one a call is of. The context holds the clock and the
    caches of its generation; it may be entered again for each step, from any thread, but from one
    at a time::

        requests = [(ditfastattn.generation(), steps(prompt)) for prompt in prompts]
        for generation, step in turns(requests):
            with generation:
                step()

    Where a generation runs in one piece, one ``with`` around it does. Without the context, a call
    of another generation than the one that began last is refused where that shows: by its
    timestep, by the scheduler's timesteps, or by latents and conditions that go on with what the
    other one has computed. It does not show between generations of one seed and equal conditions,
    nor where the sampler adds much noise of its own (DDIM with eta=1 in few steps); where these
    take turns, the context is needed. Inside the context only timesteps are compared.

    Returns:
        A context manager, to be entered around each call of the generation.
    """
    return GenerationContext()


def explicit_generation() -> GenerationContext | None:
    """Return the context that was entered last, if there is one."""
    entered = _entered.get()
    return entered[-1] if entered else None


@contextmanager
def naming_generation(name: object | None) -> Generator[None]:
    """Let calls of a model belong to the generation that the object ``name`` stands for.

    Where a sampler shows when generations begin, nothing needs to be told from timesteps alone.
    """
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def named_generation() -> object | None:
    """Return what stands for the generation under way, where the sampler or the caller says so."""
    name = _named.get()
    return explicit_generation() if name is None else name


def shown(latents: Sequence[Tensor], conditions: Sequence[Tensor]) -> Shown:
    """Return what a call shows of its generation; where a context says which, its name alone."""
    name = named_generation()
    return show(latents, conditions, name) if explicit_generation() is None else Shown(name=name)


class PerGeneration(Generic[_State]):
    """Keep one state for each thread, and for each explicit generation."""

    def __init__(self, make: Callable[[], _State]) -> None:
        """Take what makes a state where there is none."""
        self._make = make
        self._threads = threading.local()

    def current(self) -> _State:
        """Return the state of the explicit generation under way, or else this thread's."""
        explicit = explicit_generation()
        if explicit is None:
            return self.of_thread()
        return explicit.state(self, self._make)

    def of_thread(self) -> _State:
        """Return this thread's state."""
        if not hasattr(self._threads, "state"):
            self._threads.state = self._make()
        found: _State = self._threads.state
        return found
