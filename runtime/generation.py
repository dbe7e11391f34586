"""The state of one generation: the step clock, and what each guidance branch keeps between steps.

Graphs that torch runs and graphs of a bundle are stepped alike, so both use this state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.slot_schedule import SlotSchedule
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.calls import FIRST, Call, Calls
from ditfastattn.runtime.clock import StepClock, TimestepReader
from ditfastattn.runtime.hoisted import HoistedPerGeneration
from ditfastattn.runtime.matching import check_halves
from ditfastattn.runtime.trace import NOTHING, Shown


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


class Generation:
    """Follow one generation of one model in one thread.

    There is one guidance branch, or two where guidance calls the model twice a step.
    """

    def __init__(
        self,
        schedules: Sequence[SlotSchedule],
        clock: StepClock,
        on_trial: bool = False,
        halves: int = 1,
    ) -> None:
        """Take one schedule of slots per guidance branch; ``clock`` counts all calls.

        ``on_trial`` means that the plan has not served a whole generation yet. ``halves`` says how
        many guidance branches a batch holds.
        """
        self.branches = tuple(map(GuidanceBranch, schedules))
        self.on_trial = on_trial
        self._calls = Calls(clock, len(self.branches), halves)
        self._latents: list[Tensor] = []  # of step 0's first call, until its second one

    def advance(self, timestep: TimestepReader, shown: Shown = NOTHING) -> Call:
        """Return which call this is; the first one of a generation forgets the one before.

        What the call has ``shown`` decides where its timestep does not.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order.
            InterleavedError: the call goes on with a generation that is not the one under way.
        """
        ended = self._calls.at_end
        call = self._calls.advance(timestep, shown, wait=self.on_trial)
        if call == FIRST:
            self.on_trial = self.on_trial and not ended
            self._clear()
        return call

    def reset(self) -> None:
        """Forget the generation under way: the next call is the first of another."""
        self._calls.reset()
        self._clear()

    def _clear(self) -> None:
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

    def write(self, call: Call, values: Mapping[Slot, Tensor], output: Tensor) -> None:
        """Keep what ``call`` has returned for its slots; hand on what the second branch adopts.

        ``output`` is what the model has returned, of which a little is remembered.
        """
        self._calls.returned(output)
        branch, following = self.branches[call.branch], self.branches[call.branch + 1 :]
        branch.caches.write(branch.slots, call.step, values)
        if call.step == branch.slots.steps - 1:
            branch.hoisted.clear()  # prompt embeddings among them
        for other in following:
            adopted = other.slots.adopted_at(call.step)
            taken = {slot: values[slot] for slot in adopted}
            other.caches.adopt(other.slots, call.step, taken)
