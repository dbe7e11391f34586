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
from ditfastattn.passes.plan import Strategy
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

    def live_after(self, step: int) -> frozenset[str]:
        """Return the slots that a later step reads: after ``step`` all other memory is free."""
        return self._live[step]

    @cached_property
    def _live(self) -> list[frozenset[str]]:
        """List the live slots by step, once: every step of every generation asks."""
        return [
            frozenset(
                slot.name
                for slot in self.slots
                if any(written <= step < read for written, read in slot.lives)
            )
            for step in range(len(self.schedule))
        ]


def unroll(
    strategies: Sequence[Sequence[Strategy]],
    captured: CapturedGraph,
    sites: Sequence[AttentionSite],
    merge_variants: bool = False,
) -> StepProgram:
    """Return the step program of ``strategies[step][site]`` for a graph whose sites are ``sites``.

    Steps alike in strategies may still differ in what they must store for later steps. With
    ``merge_variants`` they become one variant that stores what any of them must: fewer variants,
    at the price of some caches that nobody reads.
    """
    columns = [_site_actions([row[index] for row in strategies]) for index in range(len(sites))]
    rows = list(zip(*columns, strict=True)) if columns else [()] * len(strategies)
    if merge_variants:
        rows = _merged(rows)
    columns = [list(column) for column in zip(*rows, strict=True)]
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


def _merged(rows: Sequence[tuple[SiteAction, ...]]) -> list[tuple[SiteAction, ...]]:
    """Give rows of the same strategies the union of their writes."""
    alike: dict[tuple[Strategy, ...], list[tuple[SiteAction, ...]]] = {}
    for row in rows:
        alike.setdefault(tuple(action.strategy for action in row), []).append(row)
    merged = {
        key: tuple(
            SiteAction(
                strategy,
                writes_output=any(action.writes_output for action in actions),
                writes_residual=any(action.writes_residual for action in actions),
            )
            for strategy, actions in zip(key, zip(*group, strict=True), strict=True)
        )
        for key, group in alike.items()
    }
    return [merged[tuple(action.strategy for action in row)] for row in rows]


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
    lives: list[tuple[int, int]] = []
    for start, end in zip(written, [*written, math.inf][1:], strict=True):
        readers = [step for step in read if start < step < end]
        if readers:  # a merged variant may write what this step's successors do not read
            lives.append((start, max(readers)))
    return tuple(lives)


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
