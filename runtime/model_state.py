"""The state of each model in each thread: its identity, and the generation under way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.runtime.generation import Generation
from ditfastattn.runtime.hoisted import HoistedPerTimestep
from ditfastattn.runtime.self_calibration import SelfCalibration
from ditfastattn.runtime.unrolled import UnrolledPlan


@dataclass
class ModelState:
    """One model's state in one thread.

    Once there is a ``plan``, there is a ``generation`` that runs by it; before, a ``calibration``
    may be under way.
    """

    identity: Fingerprint
    plan: UnrolledPlan | None = None
    generation: Generation | None = None
    calibration: SelfCalibration | None = None
    hoisted: HoistedPerTimestep = field(default_factory=HoistedPerTimestep)

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
    """Keep the state of each model apart, and that of each thread.

    Dynamo lets two models of the same structure share one graph, so a model is told by one of its
    parameters, its ``owner``; None where the graph has none.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._threads = threading.local()

    def of(self, owner: Tensor | None, make: Callable[[], ModelState]) -> ModelState:
        """Return this thread's state of the model with the parameter ``owner``, made if new."""
        known = self._entries()
        found = known.get(id(owner))
        if found is not None and (found.owner is None or found.owner() is owner):
            return found.state
        made = make()
        known[id(owner)] = _Entry(None if owner is None else weakref.ref(owner), made)
        return made

    def here(self) -> list[ModelState]:
        """Return the states of this thread."""
        return [entry.state for entry in list(self._entries().values())]

    def _entries(self) -> dict[int, _Entry]:
        entries: dict[int, _Entry] = self._threads.__dict__.setdefault("entries", {})
        return entries
