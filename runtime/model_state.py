"""The state of each model in each thread: its identity, and the generation under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.seen_weights import SeenWeights
from ditfastattn.runtime.self_calibration import SelfCalibration
from ditfastattn.runtime.unrolled import UnrolledPlan


@dataclass
class ModelState:
    """One model's state in one thread.

    Once there is a ``plan``, there is a ``generation`` that runs by it; before, a ``calibration``
    may be under way.
    """

    identity: Fingerprint
    weights: SeenWeights  # as the last generation began
    plan: UnrolledPlan | None = None
    generation: Generation | None = None
    calibration: SelfCalibration | None = None
    _name: object | None = None  # of the generation under way, where the caller has named it

    def begins_anew(self, name: object | None) -> bool:
        """Return whether a call belongs to another generation than the last, as far as named."""
        before, self._name = self._name, name
        return name is not None and name is not before

    def is_named(self, name: object | None) -> bool:
        """Return whether the generation under way may be the one that the caller has named."""
        return name is None or self._name is None or name is self._name

    def refuse_to_calibrate(self, timestep: float, rows: int) -> ConfigError | None:
        """Return what is wrong, if a call of so many ``rows`` goes on with the one calibrated.

        That calibration is forgotten then: its plan would be of fewer steps.
        """
        known = self.calibration
        if known is None or not known.steps or not known.goes_on(timestep):
            return None
        self.calibration = None
        return ConfigError(
            "a first generation that calibrates must call the transformer alike at each step",
            where="a generation, without a plan",
            got=f"{known.rows} row(s) up to step {known.steps - 1}, then {rows} row(s) at step "
            f"{known.steps}, or further calls",
            expected="as many rows as before: guidance that changes makes phases",
            remedy="give accelerate() the plan of calibrate(pipeline, call), which observes them",
        )

    def reset(self) -> None:
        """Forget the generation under way; a calibration under way begins anew."""
        self.calibration = None
        if self.generation is not None:
            self.generation.reset()


@dataclass
class _Entry:
    owner: weakref.ref[Tensor] | None
    state: ModelState


class ModelStates:
    """Keep the state of each model apart, and that of each thread; it dies with either.

    Dynamo lets two models of the same structure share one graph, so a model is identified by one of
    its parameters, its ``owner``; None where the graph has none.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._threads = threading.local()

    def of(self, owner: Tensor | None, make: Callable[[], ModelState]) -> ModelState:
        """Return this thread's state of the model with the parameter ``owner``, made if new."""
        known = self._entries()
        found = self.find(owner)
        if found is not None:
            return found
        made = make()
        known[id(owner)] = _Entry(_weak(owner, known), made)
        return made

    def find(self, owner: Tensor | None) -> ModelState | None:
        """Return this thread's state of the model with the parameter ``owner``, if there is one."""
        found = self._entries().get(id(owner))
        known = found is not None and (found.owner is None or found.owner() is owner)
        return found.state if found is not None and known else None

    def forget(self, owner: Tensor | None) -> None:
        """Drop this thread's state of the model with the parameter ``owner``."""
        self._entries().pop(id(owner), None)

    def here(self) -> list[ModelState]:
        """Return the states of this thread."""
        return [entry.state for entry in list(self._entries().values())]

    def _entries(self) -> dict[int, _Entry]:
        entries: dict[int, _Entry] = self._threads.__dict__.setdefault("entries", {})
        return entries


def _weak(owner: Tensor | None, known: dict[int, _Entry]) -> weakref.ref[Tensor] | None:
    """Return a reference to ``owner`` whose entry in ``known`` goes when ``owner`` does."""
    if owner is None:
        return None
    key = id(owner)

    def forget(reference: weakref.ref[Tensor]) -> None:
        entry = known.get(key)
        if entry is not None and entry.owner is reference:
            del known[key]

    return weakref.ref(owner, forget)
