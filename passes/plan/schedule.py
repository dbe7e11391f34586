"""Unroll a plan: which step variants there are, when each runs, and how long caches live."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import pairwise

from ditfastattn.core.errors import VerifyError
from ditfastattn.passes.analysis.sites import Site, with_wholes
from ditfastattn.passes.capture.dynamo import CapturedGraph
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.passes.graph.slots import (
    earlier_slot,
    number_slots,
    output_of,
    output_slot,
    previous_slot,
    residual_slot,
)
from ditfastattn.passes.plan.schema import CfgLayout, Strategy
from ditfastattn.passes.rewrites.extrapolate_steps import change_factors
from ditfastattn.passes.rewrites.pipeline import SiteAction, switches


@dataclass(frozen=True)
class CacheSlot:
    """Describe one cache slot: its bytes at this batch, and the steps of each of its lives.

    ``lives`` holds pairs (step that writes, last step that reads). No graph writes a slot that has
    a ``source``: it takes over what that slot held before the step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    lives: tuple[tuple[int, int], ...]
    source: str = ""


@dataclass(frozen=True)
class StepProgram:
    """Hold the distinct step variants, the schedule ``step -> variant`` and the cache slots.

    ``distances[step]`` says how far each site that extrapolates goes, by the names of its inputs;
    ``written[step]`` is how many bytes of caches the step makes. Where guidance calls the model
    twice a step, each lane has a program and caches of its own; what the second one shares it
    ``adopted`` from the first.
    """

    sites: tuple[Site, ...]
    variants: tuple[tuple[SiteAction, ...], ...]
    schedule: tuple[int, ...]
    slots: tuple[CacheSlot, ...]
    distances: tuple[dict[str, float], ...]
    written: tuple[int, ...]
    adopted: tuple[frozenset[str], ...] = ()

    def adopted_at(self, step: int) -> frozenset[str]:
        """Return the output slots that the step's first call hands to this, its second."""
        return self.adopted[step] if self.adopted else frozenset()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites."""
        return tuple(site.name for site in self.sites)

    @property
    def shares_cfg(self) -> bool:
        """Tell whether some site, at some step, computes the conditional half alone."""
        return any(action.strategy.shares_cfg for row in self.variants for action in row)

    @property
    def peak_cache_bytes(self) -> int:
        """Return the most bytes that caches take at any time.

        That is within a step: what it writes is made before what it replaces is dropped.
        """
        before = [0, *(self._held_after(step) for step in range(len(self.schedule) - 1))]
        return max(
            (held + made for held, made in zip(before, self.written, strict=False)), default=0
        )

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

    def moves_at(self, step: int, adopted: bool = False) -> tuple[tuple[str, str], ...]:
        """Return the pairs (slot, source) that move over, all at once, before ``step`` writes.

        With ``adopted`` those that move over before ``step`` begins, as it adopts their output.
        """
        return self._moves[step, adopted]

    @cached_property
    def _moves(self) -> dict[tuple[int, bool], tuple[tuple[str, str], ...]]:
        return {
            (step, adopted): tuple(
                (slot.name, slot.source)
                for slot in self.slots
                if slot.source
                and (output_of(slot.name) in self.adopted_at(step)) == adopted
                and any(written == step for written, _ in slot.lives)
            )
            for step in range(len(self.schedule))
            for adopted in (False, True)
        }

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


NOTHING = StepProgram(sites=(), variants=(), schedule=(), slots=(), distances=(), written=())


class Lane(Enum):
    """Name which of a step's calls of the model a program is for."""

    ONLY = "only"
    FIRST = "first"
    SECOND = "second"


def lanes_of(layout: CfgLayout) -> tuple[Lane, ...]:
    """Return a step's calls in order."""
    return (Lane.FIRST, Lane.SECOND) if layout.calls == 2 else (Lane.ONLY,)


def unroll(
    strategies: Sequence[Sequence[Strategy]],
    captured: CapturedGraph,
    sites: Sequence[Site],
    merge_variants: bool = False,
    lane: Lane = Lane.ONLY,
) -> StepProgram:
    """Return the step program of ``strategies[step][site]`` for a graph whose sites are ``sites``.

    Steps alike in strategies may still differ in what they must store for later steps. With
    ``merge_variants`` they become one variant that stores what any of them must: fewer variants,
    at the price of some caches that nobody reads.

    Where heads are split, the program's sites hold the whole attentions too, after ``sites``: what
    all groups of one do at a step, it does at its own exits, behind the output projection.
    """
    available = switches()
    strategies = available.plan(strategies, two_calls=lane is not Lane.ONLY)
    sites, chosen = _with_wholes(available.sites(sites), strategies, merge_variants)
    columns = _columns(sites, chosen, lane)
    rows = list(zip(*columns, strict=True)) if columns else [()] * len(strategies)
    if merge_variants:
        rows = _merged(rows)
    rows = [_undoubled(sites, row) for row in rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    variants = tuple(dict.fromkeys(rows))
    program = StepProgram(
        sites=tuple(sites),
        variants=variants,
        schedule=tuple(variants.index(row) for row in rows),
        slots=tuple(
            slot
            for site, column, strategy in zip(sites, columns, chosen, strict=True)
            for slot in _slots(site, column, strategy, captured)
        ),
        distances=_distances(sites, chosen, len(strategies)),
        written=tuple(_written(sites, row, captured) for row in rows),
        adopted=tuple(
            _adopted(sites, [column[step] for column in chosen], lane)
            for step in range(len(strategies))
        ),
    )
    _check_writers(program)
    return program


def _with_wholes(
    sites: Sequence[Site],
    strategies: Sequence[Sequence[Strategy]],
    merge_variants: bool,
) -> tuple[tuple[Site, ...], list[list[Strategy]]]:
    """Return ``sites`` and the attentions whose groups they are, with a column of each."""
    chosen = [[row[index] for row in strategies] for index in range(len(sites))]
    every = with_wholes(sites)
    for whole in every[len(sites) :]:
        pairs = list(zip(sites, chosen, strict=False))
        groups = [column for site, column in pairs if _is_of(site, whole)]
        rows = list(zip(*groups, strict=True))
        column = _together(whole, rows)
        if merge_variants:  # steps of the same strategies do the same
            kept = {tuple(r) for r, own in zip(strategies, column, strict=True) if own.computes}
            column = _together(whole, rows, [tuple(row) in kept for row in strategies])
        chosen.append(column)
    return every, chosen


def _is_of(site: Site, whole: Site) -> bool:
    return site.whole is not None and site.whole.name == whole.name


def _together(
    whole: Site,
    rows: Sequence[Sequence[Strategy]],
    computing: Sequence[bool] = (),
) -> list[Strategy]:
    """Return what the whole attention does at each step, when its groups do ``rows``.

    When all groups share, its output is the last step's, unless one has extrapolated then: what it
    shares is what it computed before. When each computes one half of guidance alone, so does what
    is made of them. At the steps that are ``computing`` it shares no step.
    """
    column: list[Strategy] = []
    last: Sequence[Strategy] = ()
    for step, row in enumerate(rows):
        shares = all(strategy is Strategy.SHARE_STEP for strategy in row)
        curved = any(strategy.extrapolates for strategy in last)
        if shares and not curved and not any(computing[step : step + 1]):
            column.append(Strategy.SHARE_STEP)
            continue
        last = row
        shares_cfg = all(strategy.shares_cfg for strategy in row)
        legal = Strategy.SHARE_CFG not in whole.declined
        column.append(Strategy.SHARE_CFG if shares_cfg and legal else Strategy.FULL)
    return column


def _columns(
    sites: Sequence[Site], chosen: Sequence[Sequence[Strategy]], lane: Lane
) -> list[list[SiteAction]]:
    """Return the actions of each site; a group rests while the whole attention shares."""
    shared = {
        site.name: {step for step, strategy in enumerate(column) if not strategy.computes}
        for site, column in zip(sites, chosen, strict=True)
    }
    return [
        _site_actions(column, lane, shared.get(site.whole.name, ()) if site.whole else ())
        for site, column in zip(sites, chosen, strict=True)
    ]


_UNDOUBLED = {Strategy.SHARE_CFG: Strategy.FULL, Strategy.WINDOW_SHARE_CFG: Strategy.WINDOW}


def _undoubled(sites: Sequence[Site], row: tuple[SiteAction, ...]) -> tuple[SiteAction, ...]:
    """Let groups leave it to the whole attention to copy one half of guidance over the other."""
    pairs = list(zip(sites, row, strict=True))
    copied = {site.name for site, action in pairs if action.strategy is Strategy.SHARE_CFG}
    return tuple(
        replace(action, strategy=_UNDOUBLED[action.strategy])
        if site.whole is not None and site.whole.name in copied and not action.writes_output
        else action
        for site, action in pairs
    )


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


def _adopted(sites: Sequence[Site], row: Sequence[Strategy], lane: Lane) -> frozenset[str]:
    pairs = zip(sites, row, strict=True)
    shared = [site for site, strategy in pairs if strategy.shares_cfg and lane is Lane.SECOND]
    return frozenset(
        output_slot(site.name, index) for site in shared for index in range(len(site.exits))
    )


def _site_actions(
    strategies: Sequence[Strategy], lane: Lane, idle: Collection[int] = ()
) -> list[SiteAction]:
    """Add to each step what later steps, or its second call, will read, and nothing else.

    At the steps ``idle`` nobody asks what the site would share.
    """
    actions: list[SiteAction] = []
    outputs_wanted, residual_wanted = 0, False  # how many of the outputs computed last
    for step in reversed(range(len(strategies))):
        strategy = strategies[step]
        if step in idle:
            actions.append(SiteAction(Strategy.FULL))  # dead, and erased
            continue
        computes = strategy.computes
        full = strategy is Strategy.FULL
        adopts = strategy.shares_cfg and lane is Lane.SECOND
        wanted = outputs_wanted > 0 or (strategy.shares_cfg and lane is Lane.FIRST)
        if adopts:
            actions.append(SiteAction(Strategy.SHARE_STEP))  # of the first call's output
        else:
            actions.append(
                SiteAction(
                    strategy,
                    writes_output=computes and wanted,
                    writes_residual=full and residual_wanted,
                )
            )
        outputs_wanted = max(outputs_wanted - computes, strategy.outputs_needed)
        reads = strategy.windowed and not adopts
        residual_wanted = reads or (residual_wanted and not full)
    return actions[::-1]


def _written(sites: Sequence[Site], row: Sequence[SiteAction], captured: CapturedGraph) -> int:
    total = 0
    for site, action in zip(sites, row, strict=True):
        written = site.exits if action.writes_output else ()
        total += sum(_bytes(site, node, captured) for node in written)
        total += _bytes(site, site.node, captured) if action.writes_residual else 0
    return total


def _bytes(site: Site, node: str, captured: CapturedGraph) -> int:
    tensor = value(find(captured.module.graph, node))
    return tensor.numel() * site.kept_dtype(tensor.dtype).itemsize


def _slots(
    site: Site,
    column: Sequence[SiteAction],
    strategies: Sequence[Strategy],
    captured: CapturedGraph,
) -> list[CacheSlot]:
    # What a second call adopts is there before it begins, as if the step before had written it.
    adopted = {
        step
        for step, (action, strategy) in enumerate(zip(column, strategies, strict=True))
        if strategy.computes and not action.strategy.computes
    }
    own = {step for step, action in enumerate(column) if action.writes_output}
    written = sorted(own | {step - 1 for step in adopted})
    read = [step for step, action in enumerate(column) if not action.strategy.computes]
    computed = [step for step, strategy in enumerate(strategies) if strategy.computes]

    def needing(outputs: int) -> set[int]:
        return {step for step in read if column[step].strategy.outputs_needed >= outputs}

    earlier_lives = _lives(computed, sorted(needing(3)))
    taken = {step for step, _ in earlier_lives}  # from the slot of the previous output
    previous_lives = _lives(computed, sorted(needing(2) | taken))
    moved = {step - (step in adopted) for step, _ in previous_lives}
    residual_written = [step for step, action in enumerate(column) if action.writes_residual]
    residual_read = [step for step, action in enumerate(column) if action.strategy.windowed]
    output_lives = _lives(written, sorted({*read, *moved}))
    slots: list[CacheSlot] = []
    for index, member in enumerate(site.exits):
        name, before = output_slot(site.name, index), previous_slot(site.name, index)
        earlier = earlier_slot(site.name, index)
        slots.append(_slot(site, name, member, output_lives, captured))
        slots.append(_slot(site, before, member, previous_lives, captured, source=name))
        slots.append(_slot(site, earlier, member, earlier_lives, captured, source=before))
    residual_lives = _lives(residual_written, residual_read)
    slots.append(_slot(site, residual_slot(site.name), site.node, residual_lives, captured))
    return [slot for slot in slots if slot.lives]


def _lives(written: Sequence[int], read: Sequence[int]) -> tuple[tuple[int, int], ...]:
    lives: list[tuple[int, int]] = []
    for start, end in zip(written, [*written, math.inf][1:], strict=True):
        readers = [step for step in read if start < step <= end]
        if readers:  # a merged variant may write what this step's successors do not read
            lives.append((start, max(readers)))
    return tuple(lives)


def _slot(
    site: Site,
    name: str,
    node: str,
    lives: tuple[tuple[int, int], ...],
    captured: CapturedGraph,
    source: str = "",
) -> CacheSlot:
    tensor = value(find(captured.module.graph, node))
    return CacheSlot(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(site.kept_dtype(tensor.dtype)).removeprefix("torch."),
        bytes=_bytes(site, node, captured),
        lives=lives,
        source=source,
    )


def _distances(
    sites: Sequence[Site], columns: Sequence[Sequence[Strategy]], steps: int
) -> tuple[dict[str, float], ...]:
    found: tuple[dict[str, float], ...] = tuple({} for _ in range(steps))
    for site, column in zip(sites, columns, strict=True):
        computed: list[int] = []
        for step, strategy in enumerate(column):
            if strategy.computes:
                computed.append(step)
            elif strategy.extrapolates and len(computed) >= strategy.outputs_needed:
                held = computed[: -strategy.outputs_needed - 1 : -1]  # the last one first
                gaps = [later - before for later, before in pairwise(held)]
                names = number_slots(site.name, strategy.outputs_needed)
                found[step].update(zip(names, change_factors(step - held[0], gaps), strict=True))
    return found


def _check_writers(program: StepProgram) -> None:
    """Every cache read has a writer on an earlier step."""
    written: set[tuple[int, str]] = set()
    for step, variant in enumerate(program.schedule):
        for index, action in enumerate(program.variants[variant]):
            if output_slot(program.sites[index].name, 0) in program.adopted_at(step):
                written |= {(index, "output")}
            if not action.strategy.computes and (index, "output") not in written:
                raise VerifyError(f"step {step}, site {index}: reads an output no step has written")
            needed = action.strategy.outputs_needed
            numbers = number_slots(program.sites[index].name, needed)
            if action.strategy.extrapolates and not program.distances[step].keys() >= {*numbers}:
                raise VerifyError(
                    f"step {step}, site {index}: extrapolates from less than {needed} outputs"
                )
            if action.strategy.windowed and (index, "residual") not in written:
                raise VerifyError(
                    f"step {step}, site {index}: reads a residual no step has written"
                )
            written |= {(index, "output")} if action.writes_output else set()
            written |= {(index, "residual")} if action.writes_residual else set()
