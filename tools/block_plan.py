"""Write a plan that skips ranges of blocks at given steps, as block-caching methods do.

For example, First Block Cache that computes every second step::

    column = ["full" if step % 2 == 0 else "share-step" for step in range(20)]
    call = {"prompt": ["a boat"], "num_inference_steps": 20}
    plan = block_plan(pipeline, call, {(1, -1): column})
    ditfastattn.accelerate(pipeline, plan)

Nothing is searched: ``ditfastattn.validate`` says what such a plan is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.block_ranges import BlockRanges
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import first_fault
from ditfastattn.passes.plan.nesting import idle_steps, why_not_nested
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy, strategy_named
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.record.record_plan import record_plan

Span = tuple[int, int]  # the first and the last block, counted as they run; negative from the end
Column = Sequence[Strategy | str]  # what a range does at each step


def block_plan(
    pipeline: Any,
    call: Mapping[str, Any],
    ranges: Mapping[Span, Column],
    cfg_layout: CfgLayout | None = None,
) -> Plan:
    """Return the plan in which ``ranges`` of blocks do what their columns say; one image is made.

    Attentions and feed-forwards are full at the steps at which their blocks run.

    Raises:
        ConfigError: the model has no such range, or a column is not legal.
    """
    prompt = split_prompts(call, 0)[0]
    with open_session(pipeline, prompt, cfg_layout) as session:
        session.run(DenseStepper(session), prompt)
        found = _ranges(session, list(ranges))
        every = (*session.sites, *found)
        if reason := why_not_nested(every):
            raise _error("these ranges cannot be in one plan", reason)
        columns = [[Strategy.FULL] * session.steps for _ in session.sites]
        columns += [_read(column, session.steps) for column in ranges.values()]
        idle = idle_steps(every, list(zip(*columns, strict=True)))
        for site, column, resting in zip(every, columns, idle, strict=True):
            for step in resting:
                column[step] = Strategy.SHARE_STEP
            if fault := first_fault(column, site, session.layout):
                step, reason = fault
                raise _error(f"{site.name} cannot be {column[step]} at step {step}", reason)
        session.take_sites(every)
        rows = list(zip(*columns, strict=True))
        return record_plan(session, rows, session.timesteps, Calibration(method="manual"))


def _ranges(session: Session, spans: Sequence[Span]) -> list[Site]:
    names = [site.name for site in session.sites]
    blocks = blocks_of(names)
    found: list[Site] = []
    for span in spans:
        try:
            first, last = (blocks[place] for place in span)
            ranges = BlockRanges(session.captured, session.sites)
            found.append(ranges.site(first[0], last[-1]))
        except (IndexError, ValueError) as error:
            listed = ", ".join(f"{at}: {block[0]}" for at, block in enumerate(blocks))
            raise _error(f"blocks {span[0]} to {span[1]} are no range", error, listed) from error
    return found


def blocks_of(names: Sequence[str]) -> list[list[str]]:
    """Return the sites of each block, of all whose ``names`` are given in the order they run.

    A block is the outermost member of a list of modules.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
        if numbers:
            found.setdefault(".".join(parts[: numbers[0] + 1]), []).append(name)
    return list(found.values())


def _read(column: Column, steps: int) -> list[Strategy]:
    try:
        read = [each if isinstance(each, Strategy) else strategy_named(each) for each in column]
    except ValueError as error:
        raise _error("there is no such strategy", error) from error
    if len(read) != steps:
        raise _error("a range needs a strategy for each step", len(read), str(steps))
    return read


def _error(what: str, got: object, expected: str = "") -> ConfigError:
    return ConfigError(what, where="ranges", got=got, expected=expected)
