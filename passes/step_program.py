"""Unroll a plan: which step variants there are, when each runs, and how long caches live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ditfastattn.errors import VerifyError
from ditfastattn.passes.caches import output_slot, residual_slot
from ditfastattn.passes.capture import CapturedGraph
from ditfastattn.passes.ir import find, value
from ditfastattn.passes.pipeline import SiteAction
from ditfastattn.passes.plan import Plan, Strategy
from ditfastattn.passes.sites import AttentionSite


@dataclass(frozen=True)
class CacheSlot:
    """Describe one cache slot: its bytes at this batch, and the steps of each of its lives.

    ``lives`` holds pairs (step that writes, last step that reads).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    lives: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StepProgram:
    """Hold the distinct step variants, the schedule ``step -> variant`` and the cache slots."""

    variants: tuple[tuple[SiteAction, ...], ...]
    schedule: tuple[int, ...]
    slots: tuple[CacheSlot, ...]

    @property
    def shares_cfg(self) -> bool:
        """Tell whether some site, at some step, computes the conditional half alone."""
        return any(action.strategy.shares_cfg for row in self.variants for action in row)

    @property
    def peak_cache_bytes(self) -> int:
        """Return the most bytes that caches hold between any two steps."""
        steps = range(len(self.schedule))
        return max((self._held_after(step) for step in steps), default=0)

    def _held_after(self, step: int) -> int:
        live = (
            slot.bytes
            for slot in self.slots
            for written, read in slot.lives
            if written <= step < read
        )
        return sum(live)

    def dead_after(self, step: int) -> tuple[str, ...]:
        """Return the slots whose last reader is ``step``: their memory is free from then on."""
        return self._ending.get(step, ())

    @cached_property
    def _ending(self) -> dict[int, tuple[str, ...]]:
        """List the slots by their last readers, once: every step of every generation asks."""
        ends = [(read, slot.name) for slot in self.slots for _, read in slot.lives]
        return {step: tuple(name for read, name in ends if read == step) for step, _ in ends}


def unroll(plan: Plan, captured: CapturedGraph, sites: Sequence[AttentionSite]) -> StepProgram:
    """Return the step program of ``plan`` for a graph whose sites are ``sites``."""
    columns = [
        _site_actions([row[index] for row in plan.strategies]) for index in range(len(sites))
    ]
    rows = list(zip(*columns, strict=True)) if columns else [()] * plan.sampler.steps
    variants = tuple(dict.fromkeys(rows))
    program = StepProgram(
        variants=variants,
        schedule=tuple(variants.index(row) for row in rows),
        slots=tuple(
            slot
            for site, column in zip(sites, columns, strict=True)
            for slot in _slots(site, column, captured)
        ),
    )
    _check_writers(program)
    return program


def _site_actions(strategies: Sequence[Strategy]) -> list[SiteAction]:
    """Add to each step what later steps will read of it, and nothing they will not."""
    actions: list[SiteAction] = []
    output_wanted = residual_wanted = False
    for strategy in reversed(strategies):
        computes = strategy is not Strategy.SHARE_STEP
        full = strategy is Strategy.FULL
        actions.append(
            SiteAction(
                strategy,
                writes_output=computes and output_wanted,
                writes_residual=full and residual_wanted,
            )
        )
        output_wanted = not computes
        residual_wanted = strategy.windowed or (residual_wanted and not full)
    return actions[::-1]


def _slots(
    site: AttentionSite, column: Sequence[SiteAction], captured: CapturedGraph
) -> list[CacheSlot]:
    written = [step for step, action in enumerate(column) if action.writes_output]
    read = [step for step, action in enumerate(column) if action.strategy is Strategy.SHARE_STEP]
    residual_written = [step for step, action in enumerate(column) if action.writes_residual]
    residual_read = [step for step, action in enumerate(column) if action.strategy.windowed]
    slots = [
        _slot(output_slot(site.name, index), member, _lives(written, read), captured)
        for index, member in enumerate(site.frontier)
    ]
    residual_lives = _lives(residual_written, residual_read)
    slots.append(_slot(residual_slot(site.name), site.node, residual_lives, captured))
    return [slot for slot in slots if slot.lives]


def _lives(written: Sequence[int], read: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ends = [*written, math.inf][1:]
    return tuple(
        (start, max(step for step in read if start < step < end))
        for start, end in zip(written, ends, strict=True)
    )


def _slot(
    name: str, node: str, lives: tuple[tuple[int, int], ...], captured: CapturedGraph
) -> CacheSlot:
    tensor = value(find(captured.module.graph, node))
    return CacheSlot(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.numel() * tensor.element_size(),
        lives=lives,
    )


def _check_writers(program: StepProgram) -> None:
    """Every cache read has a writer on an earlier step."""
    written: set[tuple[int, str]] = set()
    for step, variant in enumerate(program.schedule):
        for index, action in enumerate(program.variants[variant]):
            if action.strategy is Strategy.SHARE_STEP and (index, "output") not in written:
                raise VerifyError(f"step {step}, site {index}: reads an output no step has written")
            if action.strategy.windowed and (index, "residual") not in written:
                raise VerifyError(
                    f"step {step}, site {index}: reads a residual no step has written"
                )
            written |= {(index, "output")} if action.writes_output else set()
            written |= {(index, "residual")} if action.writes_residual else set()
