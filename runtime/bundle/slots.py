"""Follow the cache slots of a bundle: its manifest's names as the records that ``Caches`` takes."""

from __future__ import annotations

from ditfastattn.passes.graph.slots import Slot, parse_slot
from ditfastattn.passes.plan.slot_schedule import CacheSlot, Lives, SlotSchedule
from ditfastattn.runtime.bundle.specs import CallSchedule, SlotSpec, VariantSpec


def slot_schedule(call: CallSchedule, steps: range) -> SlotSchedule:
    """Return when each slot of a call is written, renamed, read and dropped in a phase.

    The ``steps`` of the phase are counted from its beginning, as a generation of its own.
    """
    here = slice(steps.start, steps.stop)
    return SlotSchedule(
        steps=len(steps),
        slots=tuple(
            CacheSlot(parse_slot(spec.name), (), spec.dtype, 0, _lives(spec, steps))
            for spec in call.slots
        ),
        factors=tuple(
            {parse_slot(name): number for name, number in factors.items()}
            for factors in call.factors[here]
        ),
        adopted=tuple(frozenset(map(parse_slot, slots)) for slots in call.adopted[here]),
        bytes_written=(),
    )


def _lives(spec: SlotSpec, steps: range) -> Lives:
    """Return the lives of a slot that end within ``steps``; where one ends, it began."""
    return tuple(
        (began - steps.start, last - steps.start) for began, last in spec.lives if last in steps
    )


def slots_read(variant: VariantSpec) -> tuple[Slot, ...]:
    """Return the slots that a graph reads, in the order of its inputs."""
    return tuple(parse_slot(slot) for slot, _ in variant.reads)


def slots_written(variant: VariantSpec) -> tuple[Slot, ...]:
    """Return the slots that a graph writes, in the order of its outputs."""
    return tuple(parse_slot(slot) for slot, _ in variant.writes)
