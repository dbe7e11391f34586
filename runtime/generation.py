"""The state of one generation: the step clock, and what each guidance branch keeps between steps.

Graphs that torch runs and graphs of a bundle are stepped alike, so both use this state.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.slot_schedule import SlotSchedule
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.clock import StepClock, TimestepReader
from ditfastattn.runtime.hoisted import HoistedPerGeneration
from ditfastattn.runtime.matching import check_halves

_named: ContextVar[object | None] = ContextVar("ditfastattn_generation", default=None)


@contextmanager
def naming_generation(name: object | None) -> Generator[None]:
    """Let calls of a model belong to the generation that the object ``name`` stands for.

    Where a caller knows of generations, nothing needs to be told from timesteps alone.
    """
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def named_generation() -> object | None:
    """Return what stands for the generation under way, where the caller has named it."""
    return _named.get()


@dataclass
class GuidanceBranch:
    """What one of a step's calls keeps between steps."""

    slots: SlotSchedule
    caches: Caches = field(default_factory=Caches)
    hoisted: HoistedPerGeneration = field(default_factory=HoistedPerGeneration)

    def clear(self) -> None:
        """Forget the generation under way."""
        self.caches.clear()
        self.hoisted.clear()


@dataclass(frozen=True)
class Call:
    """Say which call of a generation this is: its step, and its guidance branch in that step."""

    step: int
    branch: int


FIRST = Call(0, 0)


class Generation:
    """Follow one generation of one model in one thread.

    There is one guidance branch, or two where guidance calls the model twice a step.
    """

    def __init__(
        self, schedules: Sequence[SlotSchedule], clock: StepClock, on_trial: bool = False
    ) -> None:
        """Take one schedule of slots per guidance branch; ``clock`` counts all calls.

        ``on_trial`` means that the plan has not served a whole generation yet.
        """
        self.branches = tuple(map(GuidanceBranch, schedules))
        self.on_trial = on_trial
        self._clock = clock
        self._latents: list[Tensor] = []  # of step 0's first call, until its second one

    def advance(self, timestep: TimestepReader, anew: bool = False) -> Call:
        """Return which call this is; the first one of a generation forgets the one before.

        ``anew`` means that this call is known not to belong to the generation under way.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order.
        """
        ended = self._clock.at_end
        number = self._clock.tick(timestep, wait=self.on_trial, anew=anew)
        call = Call(*divmod(number, len(self.branches)))
        if call == FIRST:
            self.on_trial = self.on_trial and not ended
            self._begin()
        return call

    def reset(self) -> None:
        """Forget the generation under way: the next call is the first of another."""
        self._clock.reset()
        self._begin()

    def _begin(self) -> None:
        """Forget the generation before, in all branches at once.

        The first call of a step may hand outputs to the second one, at the first step too.
        """
        for branch in self.branches:
            branch.clear()
        self._latents = []

    def check_latents(self, call: Call, latents: Mapping[str, Tensor]) -> None:
        """Refuse to share guidance between different images; ``latents`` are inputs by name.

        Raises:
            ConfigError: the guidance branches of ``call`` hold different latents.
        """
        if len(self.branches) == 1:
            for name, latent in latents.items():
                first, second = latent.tensor_split(2)
                check_halves(first, second, name)
        elif call.branch == 0:
            self._latents = [latent.clone() for latent in latents.values()]
        else:
            for first, (name, second) in zip(self._latents, latents.items(), strict=True):
                check_halves(first, second, name)
            self._latents = []

    def read(
        self,
        call: Call,
        slots: Sequence[Slot],
        device: torch.device,
        hoisted: Mapping[Slot, Tensor],
    ) -> list[Tensor]:
        """Return what ``slots`` hold at ``call``; ``hoisted`` holds the values of some."""
        branch = self.branches[call.branch]
        return branch.caches.read(branch.slots, call.step, slots, device, hoisted)

    def write(self, call: Call, values: Mapping[Slot, Tensor]) -> None:
        """Keep what ``call`` has returned for its slots; hand on what the second branch adopts."""
        branch, following = self.branches[call.branch], self.branches[call.branch + 1 :]
        branch.caches.write(branch.slots, call.step, values)
        if call.step == branch.slots.steps - 1:
            branch.hoisted.clear()  # prompt embeddings among them
        for other in following:
            adopted = other.slots.adopted_at(call.step)
            taken = {slot: values[slot] for slot in adopted}
            other.caches.adopt(other.slots, call.step, taken)
