"""Ranges of blocks of tiny models, in plans and as the plan interpreter runs them."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn

from ditfastattn import CfgLayout
from ditfastattn.passes.analysis.block_ranges import BlockRanges
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.plan.legality import START, legal_strategies
from ditfastattn.passes.plan.nesting import held_by
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.runtime.reference_blocks import interpreted_ranges
from ditfastattn.tools.block_plan import blocks_of
from ditfastattn.tools.zoo.trial import mixed_strategies

BLOCKS = "transformer_blocks"
Rows = list[tuple[Strategy, ...]]


def block_range(captured: CapturedGraph, sites: Sequence[Site], first: int, last: int) -> Site:
    """Return the range from block ``first`` to block ``last``."""
    blocks = blocks_of([site.name for site in sites])
    return BlockRanges(captured, sites).site(blocks[first][0], blocks[last][-1])


def random_column(
    site: Site, steps: int, layout: CfgLayout, generator: random.Random
) -> list[Strategy]:
    """Return what ``site`` does at each step."""
    column: list[Strategy] = []
    history = START
    for _ in range(steps):
        column.append(generator.choice(legal_strategies(site, layout, history)))
        history = history.after(column[-1])
    return column


def with_ranges(
    sites: Sequence[Site],
    ranges: Sequence[tuple[Site, Sequence[Strategy]]],
    seed: int = 0,
    layout: CfgLayout = CfgLayout.COND_FIRST,
) -> tuple[tuple[Site, ...], Rows]:
    """Return ``sites`` and ``ranges``, with rows that mix all that is legal at the sites."""
    every = (*sites, *(site for site, _ in ranges))
    steps = max(len(column) for _, column in ranges)
    columns = [[Strategy.SHARE_STEP] * steps for _ in sites] + [list(own) for _, own in ranges]
    held = held_by(every)
    for place, site in enumerate(sites):
        holders = [columns[at] for at in range(len(sites), len(every)) if place in held[at]]
        runs = [step for step in range(steps) if all(own[step].computes for own in holders)]
        mixed = mixed_strategies([site], seed + place, len(runs), layout=layout)
        for step, (strategy,) in zip(runs, mixed, strict=True):
            columns[place][step] = strategy
    return every, list(zip(*columns, strict=True))


@contextmanager
def interpreting(
    interpreter: PlanInterpreter, model: nn.Module, sites: Sequence[Site]
) -> Generator[None]:
    """Let ``interpreter`` run the ranges among ``sites`` by the blocks of ``model``."""
    blocks = list(model.get_submodule(BLOCKS).children())
    ranges = [site for site in sites if site.kind is SiteKind.BLOCKS]
    spans = {site.name: [int(end.split(".")[1]) for end in site.ends] for site in ranges}
    inner_first = sorted(spans, key=lambda name: spans[name][1] - spans[name][0])
    modules = {name: blocks[spans[name][0] : spans[name][1] + 1] for name in inner_first}
    with interpreted_ranges(interpreter, modules):
        yield
