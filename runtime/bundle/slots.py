"""Follow the cache slots of a bundle: its manifest's names as the records that ``Caches`` takes."""

from __future__ import annotations

from ditfastattn.passes.graph.slots import Slot, parse_slot
from ditfastattn.passes.plan.slot_schedule import CacheSlot, SlotSchedule
from ditfastattn.runtime.bundle.specs import CallSchedule, VariantSpec


def slot_schedule(call: CallSchedule) -> SlotSchedule:
    """Return when each slot of a bundle's call is written, renamed, read and dropped."""
    return SlotSchedule(
        steps=len(call.schedule),
        slots=tuple(
            CacheSlot(parse_slot(spec.name), (), spec.dtype, 0, spec.lives) for spec in call.slots
        ),
        factors=tuple(
            {parse_slot(name): number for name, number in factors.items()}
            for factors in call.factors
        ),
        adopted=tuple(frozenset(map(parse_slot, slots)) for slots in call.adopted),
        bytes_written=(),
    )


def slots_read(variant: VariantSpec) -> tuple[Slot, ...]:
    """Return the slots that a graph reads, in the order of its inputs."""
    return tuple(parse_slot(slot) for slot, _ in variant.reads)


def slots_written(variant: VariantSpec) -> tuple[Slot, ...]:
    """Return the slots that a graph writes, in the order of its outputs."""
    return tuple(parse_slot(slot) for slot, _ in variant.writes)
