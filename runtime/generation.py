"""The state of one generation: the step clock, and what each guidance branch keeps between steps.

Graphs that torch runs and graphs of a bundle are stepped alike, so both use this state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.passes.plan.slot_schedule import SlotSchedule
from ditfastattn.runtime.caches import Caches
from ditfastattn.runtime.call_order import FIRST, Call
from ditfastattn.runtime.calls import Calls
from ditfastattn.runtime.clock import TimestepReader
from ditfastattn.runtime.halves import check_halves
from ditfastattn.runtime.hoisted import HoistedPerGeneration
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

    There is one guidance branch, or two where guidance calls the model twice a step. Those of each
    phase are its own: what one keeps, no other reads.
    """

    def __init__(self, sampler: Sampler, where: str, on_trial: bool = False) -> None:
        """Begin with none, of the steps and phases of ``sampler``.

        ``where`` names the timestep. ``on_trial`` means that the plan has not served a whole
        generation yet.
        """
        self.steps, self.on_trial = sampler.steps, on_trial
        self._spans = sampler.spans
        self._phases: list[tuple[GuidanceBranch, ...]] = [() for _ in self._spans]
        self._calls = Calls.of(sampler, where)
        self._latents: list[Tensor] = []  # of step 0's first call, until its second one

    @property
    def every_branch(self) -> tuple[GuidanceBranch, ...]:
        """Return the guidance branches of all phases."""
        return tuple(branch for phase in self._phases for branch in phase)

    def branches(self, call: Call) -> tuple[GuidanceBranch, ...]:
        """Return the guidance branches of the phase of ``call``."""
        return self._phases[call.phase]

    def branch(self, call: Call) -> GuidanceBranch:
        """Return the guidance branch of ``call``."""
        return self.branches(call)[call.branch]

    def begins_phase(self, call: Call) -> bool:
        """Return whether ``call`` is of the first step of its phase."""
        return call.step == self._spans[call.phase][0].start

    def follow(self, call: Call, schedules: Sequence[SlotSchedule]) -> None:
        """Keep caches by ``schedules``, one per guidance branch, in the phase of ``call``.

        They are those of the graph that runs it.
        """
        known = self._phases[call.phase]
        if not known:
            self._phases[call.phase] = tuple(map(GuidanceBranch, schedules))
        for branch, schedule in zip(known, schedules, strict=False):
            branch.slots = schedule

    def step_in_phase(self, call: Call) -> int:
        """Return the step of ``call``, counted from the beginning of its phase."""
        return call.step - self._spans[call.phase][0].start

    def advance(self, timestep: TimestepReader, shown: Shown = NOTHING, rows: int = 0) -> Call:
        """Return which call this is; the first one of a generation forgets the one before.

        What the call has ``shown`` decides where its timestep does not; ``rows`` are those of its
        batch, not compared where 0.

        Raises:
            ConfigError: the timesteps are not those of the plan, in order, or the transformer is
                called with other rows, or more or less often in a step, than the plan has it.
            InterleavedError: the call goes on with a generation that is not the one under way.
        """
        ended = self._calls.at_end
        call = self._calls.advance(timestep, shown, wait=self.on_trial, rows=rows)
        if call == FIRST:
            self.on_trial = self.on_trial and not ended
            self._clear()
        return call

    def other_rows(self, timestep: float, rows: int) -> ConfigError | None:
        """Return what is wrong with a call of so many ``rows``, if this generation awaits it."""
        return self._calls.other_rows(timestep, rows)

    def reset(self) -> None:
        """Forget the generation under way: the next call is the first of another."""
        self._calls.reset()
        self._clear()

    def _clear(self) -> None:
        """Forget the generation before, in all branches at once.

        The first call of a step may hand outputs to the second one, at the first step too.
        """
        for branch in self.every_branch:
            branch.clear()
        self._latents = []

    def check_latents(self, call: Call, latents: Mapping[str, Tensor]) -> None:
        """Refuse to share guidance between different images; ``latents`` are inputs by name.

        Raises:
            ConfigError: the guidance branches of ``call`` hold different latents.
        """
        if len(self.branches(call)) == 1:
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
        branch, step = self.branch(call), self.step_in_phase(call)
        return branch.caches.read(branch.slots, step, slots, device, hoisted)

    def write(self, call: Call, values: Mapping[Slot, Tensor], output: Tensor) -> None:
        """Keep what ``call`` has returned for its slots; hand on what the second branch adopts.

        ``output`` is what the model has returned, of which a little is remembered.
        """
        self._calls.returned(output)
        branch, step = self.branch(call), self.step_in_phase(call)
        branch.caches.write(branch.slots, step, values)
        if step == branch.slots.steps - 1:
            branch.hoisted.clear()  # prompt embeddings among them
        for other in self.branches(call)[call.branch + 1 :]:
            adopted = other.slots.adopted_at(step)
            taken = {slot: values[slot] for slot in adopted}
            other.caches.adopt(other.slots, step, taken)
