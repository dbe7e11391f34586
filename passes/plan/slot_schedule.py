"""When each cache slot is written, renamed, read and dropped: the lifetimes of a plan's caches."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from ditfastattn.passes.graph.slots import Slot

Lives = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CacheSlot:
    """Describe one cache slot: its tensor at this batch, and the steps of each of its lives.

    ``lives`` holds pairs (step that writes, last step that reads). A slot that has a ``source``
    takes over what that slot held before the step.
    """

    slot: Slot
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    lives: Lives


@dataclass(frozen=True)
class SlotSchedule:
    """Hold the cache slots of a generation, the factors of each step, and what it adopts.

    ``factors[step]`` are the numbers that sites combine earlier outputs with. ``adopted[step]``
    are the outputs and residuals that the step's first call hands to this one, its second, where
    guidance calls the model twice a step. ``bytes_written[step]`` counts what the step returns for
    its slots.
    """

    steps: int
    slots: tuple[CacheSlot, ...]
    factors: tuple[dict[Slot, float], ...]
    adopted: tuple[frozenset[Slot], ...]
    bytes_written: tuple[int, ...]

    def adopted_at(self, step: int) -> frozenset[Slot]:
        """Return the slots that the step's first call hands to this, its second."""
        return self.adopted[step] if self.adopted else frozenset()

    @property
    def peak_bytes(self) -> int:
        """Return the most bytes that caches take at any time.

        That is within a step: what it writes is made before what it replaces is dropped.
        """
        before = [0, *(self._held_after(step) for step in range(self.steps - 1))]
        return max(
            (held + made for held, made in zip(before, self.bytes_written, strict=False)),
            default=0,
        )

    def _held_after(self, step: int) -> int:
        live = (
            each.bytes
            for each in self.slots
            for written, read in each.lives
            if written <= step < read
        )
        return sum(live)

    def live_after(self, step: int) -> frozenset[Slot]:
        """Return the slots that a later step reads: after ``step`` all other memory is free."""
        return self._live[step]

    def moves_at(self, step: int, adopted: bool = False) -> tuple[tuple[Slot, Slot], ...]:
        """Return the pairs (slot, source) to rename, all at once, before ``step`` writes.

        With ``adopted`` those to rename before ``step`` begins, as it adopts their output.
        """
        return self._moves[step, adopted]

    @cached_property
    def _moves(self) -> dict[tuple[int, bool], tuple[tuple[Slot, Slot], ...]]:
        return {
            (step, adopted): tuple(
                (each.slot, each.slot.source)
                for each in self.slots
                if each.slot.source is not None
                and (each.slot.latest in self.adopted_at(step)) == adopted
                and any(written == step for written, _ in each.lives)
            )
            for step in range(self.steps)
            for adopted in (False, True)
        }

    @cached_property
    def _live(self) -> list[frozenset[Slot]]:
        """List the live slots by step, once: every step of every generation asks."""
        return [
            frozenset(
                each.slot
                for each in self.slots
                if any(written <= step < read for written, read in each.lives)
            )
            for step in range(self.steps)
        ]


NO_SLOTS = SlotSchedule(steps=0, slots=(), factors=(), adopted=(), bytes_written=())


def without_slots(steps: int) -> SlotSchedule:
    """Return that of so many ``steps`` that keep nothing."""
    return SlotSchedule(
        steps=steps,
        slots=(),
        factors=({},) * steps,
        adopted=(frozenset(),) * steps,
        bytes_written=(0,) * steps,
    )


def join_schedules(schedules: Sequence[SlotSchedule]) -> SlotSchedule:
    """Return one schedule of the steps of all ``schedules``, which follow one another."""
    slots: dict[Slot, CacheSlot] = {}
    begins = 0
    for schedule in schedules:
        for each in schedule.slots:
            known = slots[each.slot].lives if each.slot in slots else ()
            moved = tuple((began + begins, last + begins) for began, last in each.lives)
            slots[each.slot] = replace(each, lives=(*known, *moved))
        begins += schedule.steps
    return SlotSchedule(
        steps=begins,
        slots=tuple(slots.values()),
        factors=tuple(row for schedule in schedules for row in schedule.factors),
        adopted=tuple(row for schedule in schedules for row in schedule.adopted),
        bytes_written=tuple(row for schedule in schedules for row in schedule.bytes_written),
    )


def lives(written: Sequence[int], read: Sequence[int]) -> Lives:
    """Return the lives of a slot that the steps ``written`` fill and the steps ``read`` read.

    A step reads before it writes. A value that no step reads has no life.
    """
    found: list[tuple[int, int]] = []
    for start, end in zip(written, [*written, math.inf][1:], strict=True):
        readers = [step for step in read if start < step <= end]
        if readers:  # a merged variant may write what this step's successors do not read
            found.append((start, max(readers)))
    return tuple(found)


def output_lives(
    computed: Sequence[int],
    written: Sequence[int],
    outputs_read: Sequence[tuple[int, int]],
    adopted: Collection[int],
) -> list[Lives]:
    """Return the lives of a site's last output, of the one before it, and so on.

    Args:
        computed: the steps at which an output is computed.
        written: the steps after which a graph, or another call, has given the last output.
        outputs_read: pairs of a step and how many outputs it reads.
        adopted: the computed steps whose output another call gives before the step begins.
    """
    most = max((count for _, count in outputs_read), default=0)
    found: list[Lives] = []
    taken: set[int] = set()  # steps at which an older slot takes over this one's content
    for age in range(most - 1, 0, -1):
        readers = {step for step, count in outputs_read if count > age}
        aged = lives(computed, sorted(readers | taken))
        taken = {step for step, _ in aged}
        found.insert(0, aged)
    moved = {step - (step in adopted) for step in taken}
    readers = {step for step, count in outputs_read if count > 0}
    return [lives(written, sorted(readers | moved)), *found]


def gaps_before(computed: Sequence[int], outputs: int) -> tuple[int, ...]:
    """Return the steps between the last ``outputs`` of ``computed``, the latest gap first."""
    held = computed[: -outputs - 1 : -1]
    return tuple(later - before for later, before in pairwise(held))
