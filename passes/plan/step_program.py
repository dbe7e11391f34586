"""Unroll a plan: which step variants there are, when each runs, and how long caches live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ditfastattn.core.errors import VerifyError
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.passes.graph.slots import Slot, factor_slots, output_slot, residual_slot
from ditfastattn.passes.plan.actions import (
    ActionRow,
    SiteAction,
    leave_copying_to_wholes,
    merge_writes,
)
from ditfastattn.passes.plan.guidance import GuidanceCall
from ditfastattn.passes.plan.nesting import idle_steps
from ditfastattn.passes.plan.slot_schedule import (
    NO_SLOTS,
    CacheSlot,
    Lives,
    SlotSchedule,
    gaps_before,
    lives,
    output_lives,
)
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.plan.whole_attentions import (
    columns_of_actions,
    with_whole_columns,
)


@dataclass(frozen=True)
class StepProgram:
    """Hold the distinct step variants, the schedule ``step -> variant`` and the cache slots.

    Where guidance calls the model twice a step, each call has a program and caches of its own.
    """

    sites: tuple[Site, ...]
    variants: tuple[ActionRow, ...]
    schedule: tuple[int, ...]
    slots: SlotSchedule

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites."""
        return tuple(site.name for site in self.sites)

    @property
    def shares_guidance(self) -> bool:
        """Return whether some site, at some step, computes the conditional branch alone."""
        return any(action.strategy.shares_guidance for row in self.variants for action in row)


NOTHING = StepProgram(sites=(), variants=(), schedule=(), slots=NO_SLOTS)


def unroll(
    rows: Sequence[Sequence[Strategy]],
    captured: CapturedGraph,
    sites: Sequence[Site],
    merge_variants: bool = False,
    call: GuidanceCall = GuidanceCall.ONLY,
) -> StepProgram:
    """Return the step program of ``rows[step][site]`` for a graph whose sites are ``sites``.

    Steps alike in strategies may still differ in what they must store for later steps. With
    ``merge_variants`` they become one variant that stores what any of them must: fewer variants,
    at the price of some caches that no step reads.

    Where heads are split, the program's sites hold the whole attentions too, after ``sites``.

    Raises:
        VerifyError: a step reads a cache that no earlier step has written.
    """
    every, chosen, idle = with_whole_columns(sites, rows, merge_variants, idle_steps(sites, rows))
    columns = columns_of_actions(every, chosen, call, idle)
    acting = list(zip(*columns, strict=True)) or [()] * len(rows)
    if merge_variants:
        acting = merge_writes(acting)
    acting = [leave_copying_to_wholes(every, row) for row in acting]
    variants = tuple(dict.fromkeys(acting))
    program = StepProgram(
        sites=tuple(every),
        variants=variants,
        schedule=tuple(variants.index(row) for row in acting),
        slots=_slot_schedule(captured, every, chosen, acting, call),
    )
    _check_caches(program)
    return program


def _slot_schedule(
    captured: CapturedGraph,
    sites: Sequence[Site],
    chosen: Sequence[Sequence[Strategy]],
    acting: Sequence[ActionRow],
    call: GuidanceCall,
) -> SlotSchedule:
    columns = [[row[index] for row in acting] for index in range(len(sites))]
    planned = list(zip(sites, columns, chosen, strict=True))
    slots = tuple(
        slot
        for site, column, strategies in planned
        for slot in _slots(site, column, strategies, captured)
    )
    rows = list(zip(*chosen, strict=True)) or [()] * len(acting)
    second = call is GuidanceCall.SECOND
    return SlotSchedule(
        steps=len(acting),
        slots=slots,
        factors=_factors(sites, chosen, len(acting), call),
        adopted=tuple(
            _adopted(sites, row, step, slots) if second else frozenset()
            for step, row in enumerate(rows)
        ),
        bytes_written=tuple(_bytes_written(sites, row, captured) for row in acting),
    )


def _slots(
    site: Site,
    column: Sequence[SiteAction],
    strategies: Sequence[Strategy],
    captured: CapturedGraph,
) -> list[CacheSlot]:
    # What a second call adopts is there before it begins, as if the step before had written it.
    pairs = list(zip(column, strategies, strict=True))
    adopted = {
        step
        for step, (action, strategy) in enumerate(pairs)
        if strategy.computes and not action.strategy.computes
    }
    written = {step for step, action in enumerate(column) if action.writes_output}
    reads = [(step, action.strategy.outputs_read) for step, action in enumerate(column)]
    by_age = output_lives(
        computed=[step for step, strategy in enumerate(strategies) if strategy.computes],
        written=sorted(written | {step - 1 for step in adopted}),
        outputs_read=[(step, count) for step, count in reads if count],
        adopted=adopted,
    )
    stored = {step for step, action in enumerate(column) if action.writes_residual}
    refreshed = {step - 1 for step in adopted if strategies[step].refreshes_residual}
    residual = lives(
        sorted(stored | refreshed),
        [step for step, action in enumerate(column) if action.strategy.windowed],
    )
    slots = [
        _slot(site, output_slot(site.name, index, age), member, of_age, captured)
        for index, member in enumerate(site.exits)
        for age, of_age in enumerate(by_age)
    ]
    slots.append(_slot(site, residual_slot(site.name), site.node, residual, captured))
    return [slot for slot in slots if slot.lives]


def _slot(site: Site, slot: Slot, node: str, lived: Lives, captured: CapturedGraph) -> CacheSlot:
    tensor = value(find(captured.module.graph, node))
    return CacheSlot(
        slot=slot,
        shape=tuple(tensor.shape),
        dtype=str(site.kept_dtype(tensor.dtype)).removeprefix("torch."),
        bytes=_bytes(site, node, captured),
        lives=lived,
    )


def _bytes(site: Site, node: str, captured: CapturedGraph) -> int:
    tensor = value(find(captured.module.graph, node))
    return tensor.numel() * site.kept_dtype(tensor.dtype).itemsize


def _bytes_written(sites: Sequence[Site], row: ActionRow, captured: CapturedGraph) -> int:
    total = 0
    for site, action in zip(sites, row, strict=True):
        written = site.exits if action.writes_output else ()
        total += sum(_bytes(site, node, captured) for node in written)
        total += _bytes(site, site.node, captured) if action.writes_residual else 0
    return total


def _adopted(
    sites: Sequence[Site], row: Sequence[Strategy], step: int, slots: Sequence[CacheSlot]
) -> frozenset[Slot]:
    """Return what the step's first call hands to the second: outputs, and residuals to be read."""
    held = {each.slot for each in slots if any(began == step - 1 for began, _ in each.lives)}
    found: set[Slot] = set()
    for site, strategy in zip(sites, row, strict=True):
        if strategy.shares_guidance:
            found |= {output_slot(site.name, index) for index in range(len(site.exits))}
            if strategy.refreshes_residual:
                found |= {residual_slot(site.name)} & held
    return frozenset(found)


def _factors(
    sites: Sequence[Site],
    columns: Sequence[Sequence[Strategy]],
    steps: int,
    call: GuidanceCall,
) -> tuple[dict[Slot, float], ...]:
    found: tuple[dict[Slot, float], ...] = tuple({} for _ in range(steps))
    for site, column in zip(sites, columns, strict=True):
        computed: list[int] = []
        for step, strategy in enumerate(column):
            if strategy.computes:
                computed.append(step)
            elif strategy.fitted:
                numbers = _coefficients(site, step, call)
                slots = factor_slots(site.name, len(numbers))
                found[step].update(zip(slots, numbers, strict=True))
            elif len(computed) >= strategy.outputs_read:
                gaps = gaps_before(computed, strategy.outputs_read)
                numbers = strategy.factors(step - computed[-1], gaps)
                slots = factor_slots(site.name, len(numbers))
                found[step].update(zip(slots, numbers, strict=True))
    return found


def _coefficients(site: Site, step: int, call: GuidanceCall) -> tuple[float, ...]:
    """Return the coefficients that ``call`` takes at ``step``, those of both branches in a batch.

    Raises:
        VerifyError: the plan has none.
    """
    rows = site.coefficients[step] if site.coefficients else ()
    if not rows:
        raise VerifyError(f"{site.name} is fitted at step {step}, for which it has no coefficients")
    if call is not GuidanceCall.ONLY:
        return rows[call is GuidanceCall.SECOND]
    return tuple(number for row in rows for number in row)


def _check_caches(program: StepProgram) -> None:
    """Every cache that a step reads was written at an earlier step, or is adopted, and is kept."""
    kept = {each.slot: each.lives for each in program.slots.slots}
    for step, variant in enumerate(program.schedule):
        for site, action in zip(program.sites, program.variants[variant], strict=True):
            count = 0 if action.strategy.fitted else action.strategy.factor_count
            factors = factor_slots(site.name, count)
            absent = [slot for slot in factors if slot not in program.slots.factors[step]]
            absent += [
                slot
                for slot in _read_by(site, action)
                if not any(began < step <= last for began, last in kept.get(slot, ()))
            ]
            if absent:
                raise VerifyError(f"step {step} reads {absent[0]}, which no step has written")


def _read_by(site: Site, action: SiteAction) -> list[Slot]:
    read = [
        output_slot(site.name, index, age)
        for index in range(len(site.exits))
        for age in range(action.strategy.outputs_read)
    ]
    return [*read, *([residual_slot(site.name)] if action.strategy.windowed else [])]
