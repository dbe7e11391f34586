"""Hold the caches of one generation between its steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ditfastattn.passes.graph.slots import Slot
from ditfastattn.passes.plan.slot_schedule import SlotSchedule


class Caches:
    """Give each step the slots it reads, keep what it writes, and drop what no later step reads."""

    def __init__(self) -> None:
        """Begin with nothing; ``peak`` is the most bytes held at any time so far."""
        self._held: dict[Slot, Tensor] = {}
        self.peak = 0

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()

    @property
    def bytes(self) -> int:
        """Return how much memory the caches hold, each tensor counted once."""
        return sum({id(item): item.nbytes for item in self._held.values()}.values())

    @property
    def tensors(self) -> set[int]:
        """Return the identities of the tensors that the caches hold."""
        return {id(item) for item in self._held.values()}

    def read(
        self,
        schedule: SlotSchedule,
        step: int,
        slots: Sequence[Slot],
        device: torch.device,
        hoisted: Mapping[Slot, Tensor],
    ) -> list[Tensor]:
        """Return what ``slots`` hold at ``step``; ``hoisted`` holds what was computed ahead."""
        factors = schedule.factors[step]
        found: list[Tensor] = []
        for slot in slots:
            if slot in factors:
                found.append(_number(factors[slot], device))
            else:
                found.append(hoisted[slot] if slot in hoisted else self._held[slot])
        return found

    def adopt(self, schedule: SlotSchedule, step: int, values: Mapping[Slot, Tensor]) -> None:
        """Take over, before ``step``, outputs that the step's first call has computed."""
        self._move(schedule.moves_at(step, adopted=True))
        self._held.update(values)

    def write(self, schedule: SlotSchedule, step: int, values: Mapping[Slot, Tensor]) -> None:
        """Keep what ``step`` has returned for its slots."""
        self.peak = max(self.peak, self.bytes + sum(item.nbytes for item in values.values()))
        self._move(schedule.moves_at(step))
        self._held.update(values)
        for slot in self._held.keys() - schedule.live_after(step):
            del self._held[slot]

    def _move(self, moves: Sequence[tuple[Slot, Slot]]) -> None:
        self._held.update({slot: self._held[source] for slot, source in moves})  # all at once


class Buffers:
    """Provide the memory that caches are written into, that of dropped caches first.

    So a slot that every step writes has two tensors in turn, and no step allocates any.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._made: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}

    @property
    def count(self) -> int:
        """Return how many tensors there are."""
        return sum(map(len, self._made.values()))

    def clear(self) -> None:
        """Free the memory."""
        self._made.clear()

    def take(
        self,
        wanted: Sequence[tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
        caches: Iterable[Caches],
    ) -> list[Tensor]:
        """Return a tensor for each of ``wanted`` that none of ``caches`` holds."""
        used = {item for each in caches for item in each.tensors}
        found: list[Tensor] = []
        for shape, dtype in wanted:
            made = self._made.setdefault((shape, dtype), [])
            free = next((item for item in made if id(item) not in used), None)
            if free is None:
                free = torch.empty(shape, dtype=dtype, device=device)
                made.append(free)
            used.add(id(free))
            found.append(free)
        return found


@functools.cache
def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)
